# `make setup` makes everything the other targets need in .venv, from a bare machine with Python 3.10
# or later (with venv and its headers: python3-venv, python3-dev) and g++ with C++20. Each target does it
# first; done once, it costs nothing.
#
# TORCH chooses the version of torch, PYTHON the interpreter; docs/install.md has what is tested. Whether
# pip gets a CPU or a CUDA build of torch depends on where pip looks.
#   make test TORCH=2.14.1 PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup test test-integrations test-aten test-sanitize test-simt test-gpu bench-gpu gpu-day sass mutate lint format demo demo-distributed docs release-check clean

PYTHON ?= python3
TORCH ?= 2.13.0
DYKAF_CUDA ?= auto
export DYKAF_CUDA

GPU_TESTS := $(shell cat tests/gpu_tests.txt)

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# What is done is stamped with the choices it was done with: another choice does it again.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
DEPS := $(VENV)/.deps-$(TORCH)-$(PYTHON_VERSION)
BUILT := $(VENV)/.built-$(TORCH)-$(PYTHON_VERSION)-$(DYKAF_CUDA)
TOOLS := $(VENV)/.tools-$(TORCH)-$(PYTHON_VERSION)

BUILD_FILES := setup.py pyproject.toml CMakeLists.txt
CPP_FILES := $(shell find csrc -type f)
CLANG_FORMAT_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CPP_FILES) $(wildcard tests/simt/*))

setup: $(BUILT)
	@echo "==> ready: torch $(TORCH) and dykaf in $(VENV)"

$(DEPS): requirements-dev.txt
	@rm -f $(VENV)/.deps-* $(VENV)/.built-*
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed, got " + sys.version.split()[0] + "; name one by make PYTHON=...")'
	@$(PY) -c 'import pip, sys; assert "%d.%d" % sys.version_info[:2] == "$(PYTHON_VERSION)"' 2>/dev/null || \
	  { echo "==> creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "==> installing torch $(TORCH) and the tools of requirements-dev.txt (a minute or more)"
	@$(PY) -m pip install --quiet "torch==$(TORCH)" -r requirements-dev.txt
	@touch $@

# The first command shows the compiler's progress; the second only registers its result in .venv.
$(BUILT): $(DEPS) $(BUILD_FILES) $(CPP_FILES)
	@rm -f $(VENV)/.built-*
	@echo "==> building the extension (the first time a minute or more)"
	@$(PY) setup.py --quiet build_ext --inplace
	@echo "==> installing dykaf, editable, in $(VENV)"
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

test: $(BUILT)
	@echo "==> running the tests"
	@$(PY) -m pytest

# With the tools of docs/recipes, which pyproject.toml pins; torch is named so that none changes it.
$(TOOLS): $(DEPS) pyproject.toml | $(BUILT)
	@rm -f $(VENV)/.tools-*
	@echo "==> installing the tools of docs/recipes (a minute or more)"
	@$(PY) -m pip install --quiet --no-build-isolation "torch==$(TORCH)" --editable ".[integrations]"
	@touch $@

test-integrations: $(BUILT) $(TOOLS)
	@echo "==> running the tests of dykaf.integrations and the recipes"
	@$(PY) -m pytest tests/integrations

# The backend of torch's own operations, on tensors on the CPU.
test-aten: $(BUILT)
	@echo "==> running the tests of values with --backend aten"
	@$(PY) -m pytest -q --backend aten tests/test_trajectory.py tests/test_all_or_nothing.py $(GPU_TESTS)

# Built in a directory of its own and run from there, so the normal build stays as it is. libstdc++ is
# preloaded too, since libasan looks up __cxa_throw as it starts, before Python has loaded any C++. No
# capture: a sanitizer reports as it ends the process.
SANITIZED := build/sanitized
test-sanitize: $(BUILT)
	@echo "==> building the extension with AddressSanitizer and UndefinedBehaviorSanitizer"
	@DYKAF_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-lib $(SANITIZED)
	@echo "==> running the tests of the ops with it"
	@preload="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"; \
	  PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$$preload" \
	  $(PY) -m pytest --capture=no tests/test_ops.py tests/test_ops_bases.py

# The CUDA kernels on the CPU: tests/simt/README.md. SIMT_FLAGS=--quick takes the part that CI runs.
test-simt: $(BUILT)
	@echo "==> running the CUDA kernels under the host executor"
	@$(PYTHON) tests/simt/build.py $(SIMT_FLAGS)
	@echo "==> building the extension over the host executor"
	@$(PY) tests/simt/extension.py
	@echo "==> running $(GPU_TESTS) with it"
	@PYTHONPATH=build/simt/package $(PY) -m pytest -q --backend simt $(GPU_TESTS)

# On a machine with a GPU (bench/gpu_day.py): what a part says goes to GPU_OUT, too. Where torch sees no
# GPU the parts that need one say so in one line. The first two use .venv. gpu-day takes the interpreter
# as it is and no network: make gpu-day PYTHON=python3 OUT=folder, and PARTS="build test" for less.
GPU_OUT := build/gpu
PARTS ?= build test sanitize bench
OUT ?= $(GPU_OUT)

test-gpu: $(BUILT)
	@$(PY) bench/gpu_day.py --out $(GPU_OUT) --parts test sanitize

bench-gpu: $(BUILT)
	@$(PY) bench/gpu_day.py --out $(GPU_OUT) --parts bench

gpu-day:
	@$(PYTHON) bench/gpu_day.py --out $(OUT) --parts $(PARTS) $(GPU_DAY_FLAGS)

# The machine code against its budgets, where there is an nvcc. SASS_FLAGS="--archs 86 89 100 120"
# compiles for the others.
SASS_FLAGS ?= --archs 80 90 --check
sass: $(BUILT)
	@if ! $(PY) -c "import sys; from bench.sass import toolchain; sys.exit(not toolchain.find_nvcc())"; \
	then echo "==> skipped: no nvcc"; exit 0; fi; \
	echo "==> compiling the CUDA kernels and reading their machine code"; \
	$(PY) -m bench.sass $(SASS_FLAGS) > build/sass.txt || { cat build/sass.txt; exit 1; }; \
	echo "==> within the budgets; tables: build/sass.txt"

# MUTATE_FLAGS="--every 40" takes the part that CI runs.
mutate:
	@echo "==> putting faults into the CUDA kernels, one at a time"
	@$(PYTHON) tests/simt/mutate.py $(MUTATE_FLAGS)

lint: $(BUILT)
	@echo "==> ruff check"
	@$(BIN)/ruff check
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check
	@echo "==> mypy --strict python"
	@$(BIN)/mypy --strict python
	@echo "==> clang-format --dry-run"
	@$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMAT_FILES)
	@echo "==> the faults' places in the CUDA kernels"
	@$(PY) tests/simt/mutate.py --list > /dev/null

format: $(DEPS)
	@echo "==> formatting Python and C++"
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CLANG_FORMAT_FILES)

demo: $(BUILT)
	@echo "==> running the demo"
	@$(PY) examples/demo.py

demo-distributed: $(BUILT)
	@echo "==> running the demo of two processes and one"
	@$(PY) examples/demo_distributed.py

# The site of docs/ and of the Markdown files beside it, to be opened from the disk: build/site/index.html.
# Its tools are the extra "docs" of pyproject.toml; the extension is not needed.
DOCS := $(VENV)/.docs-$(PYTHON_VERSION)
DOCS_TOOLS := $(PY) -c 'import sys; toml = __import__("tomllib" if sys.version_info >= (3, 11) else "tomli"); \
  print("\n".join(toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))'

$(DOCS): $(DEPS) pyproject.toml
	@rm -f $(VENV)/.docs-*
	@echo "==> installing the tools of the documentation"
	@$(DOCS_TOOLS) > $(VENV)/docs.txt
	@$(PY) -m pip install --quiet -r $(VENV)/docs.txt
	@touch $@

docs: $(DOCS)
	@echo "==> building the site"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict 2>&1 | { grep -v ^INFO || true; }
	@echo "==> open build/site/index.html"

# What a release must pass (release/check.py): RELEASE_FLAGS="--torch 2.13.0 --untagged" takes one torch.
release-check:
	@$(PYTHON) release/check.py $(RELEASE_FLAGS)

clean:
	@echo "==> removing what was built ($(VENV) stays; rm -r $(VENV) removes it)"
	@rm -rf build dist python/*.egg-info python/dykaf/_C.*.so python/dykaf/_build_info.py
	@rm -f $(VENV)/.built-*
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
