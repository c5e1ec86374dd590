"""The build: who may include whom, and what the module says and links.

Each check is a function that is also run on a case it must reject.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dykaf
from dykaf import _build_info

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}

STD = r"[a-z_]+"
OWN = r"dykaf/.+"
TORCH = r"(torch|ATen|c10|pybind11)/.+"
CUDA = r"(cuda|cublas|cusolver)\w*\.h|mma\.h|vector_types\.h|cooperative_groups(/.+)?|(cuda|nv)/\w+"
PLAIN = r"cuda/kernels/\w+\.h"  # what a host compiler understands
# Directory -> the headers its files may include. Besides, every file may include one of its own
# directory, but for the plain headers of the kernels: those are for planning too.
INCLUDE_RULES = {
    "csrc/include/dykaf": [STD, OWN],
    "csrc/aten": [STD, OWN, TORCH, r"xmmintrin\.h"],  # the processor's own, for denormals
    "csrc/cpu": [STD, OWN, TORCH, r"aten/.+"],
    "csrc/cuda/kernels": [STD, OWN, CUDA],
    "csrc/cuda/plan": [STD, OWN, PLAIN],
    "csrc/cuda/library": [STD, OWN],
    # It calls down, never up.
    "csrc/bindings": [STD, OWN, TORCH, CUDA, r"Python\.h", r"dlfcn\.h", r"aten/.+"],
}


def forbidden_includes(path: str, text: str) -> list[str]:
    """Returns the headers that the file at this path (relative to the root) must not include."""
    area = next((a for a in INCLUDE_RULES if path.startswith(a + "/")), None)
    if area is None:
        return [f"{path} lies in no known directory"]
    is_plain = area == "csrc/cuda/kernels" and path.endswith(".h")
    rules = [STD, OWN, PLAIN] if is_plain else INCLUDE_RULES[area]
    bad = []
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        places = [(ROOT / path).parent / name, ROOT / "csrc" / name]
        is_neighbour = (
            bracket == '"'
            and not is_plain
            and any(p.resolve().is_relative_to(ROOT / area) and p.is_file() for p in places)
        )
        is_allowed = any(re.fullmatch(rule, name) for rule in rules)
        if "simt" in name or not (is_neighbour or is_allowed):
            bad.append(name)
    return bad


def package_sources() -> list[str]:
    files = (p for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCE_SUFFIXES)
    return sorted(p.relative_to(ROOT).as_posix() for p in files)


def test_there_are_sources():
    areas = {a for a in INCLUDE_RULES for p in package_sources() if p.startswith(a + "/")}
    assert areas == set(INCLUDE_RULES)


@pytest.mark.parametrize("path", package_sources())
def test_include_rules(path):
    assert forbidden_includes(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/include/dykaf/x.h", "#include <ATen/core/Tensor.h>"),
        ("csrc/include/dykaf/x.h", "#include <cuda_runtime.h>"),
        ("csrc/include/dykaf/x.h", "#include <stdint.h>"),
        ("csrc/cpu/x.cpp", "#include <cuda_runtime.h>"),
        ("csrc/cpu/x.cpp", "#include <Python.h>"),
        ("csrc/aten/x.cpp", '#include "cpu/loops.h"'),
        ("csrc/aten/x.cpp", "#include <cuda_runtime.h>"),
        ("csrc/cpu/x.cpp", '  #  include "bindings/module.h"'),
        ("csrc/cuda/kernels/x.cu", "#include <torch/extension.h>"),
        ("csrc/cuda/kernels/device/x.cuh", "#include <c10/util/Half.h>"),
        ("csrc/cuda/kernels/device/x.cuh", "#include <pybind11/pybind11.h>"),
        ("csrc/cuda/kernels/x.cuh", '#include "tests/simt/executor.h"'),
        ("csrc/cuda/kernels/x.cu", '#include "cuda/plan/group_plan.h"'),
        ("csrc/cuda/kernels/x.h", "#include <cuda_runtime.h>"),
        ("csrc/cuda/kernels/x.h", '#include "cuda/kernels/gemm_tile.cuh"'),
        ("csrc/cuda/plan/x.cpp", '#include "cuda/kernels/gemm_tile.cuh"'),
        ("csrc/cuda/plan/x.cpp", '#include "cuda/kernels/device/platform.cuh"'),
        ("csrc/cuda/plan/x.h", "#include <cuda_runtime.h>"),
        ("csrc/cuda/plan/x.h", "#include <ATen/core/Tensor.h>"),
        ("csrc/cuda/library/x.cpp", "#include <cublas_v2.h>"),
        ("csrc/cuda/library/x.cpp", '#include "cuda/kernels/gemm.h"'),
        ("csrc/cuda/x.cu", ""),
        ("csrc/bindings/x.cpp", '#include "../../tests/simt/executor.h"'),
        ("csrc/elsewhere/x.cpp", ""),
    ],
)
def test_include_rules_reject(path, line):
    assert forbidden_includes(path, f"// a comment\n#include <cstdint>\n{line}\n") != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/include/dykaf/x.h", '#include "dykaf/y.h"'),
        ("csrc/cpu/x.cpp", "#include <ATen/Parallel.h>"),
        ("csrc/cpu/x.cpp", '#include "aten/products.h"'),
        ("csrc/cuda/kernels/x.cu", "#include <cuda_bf16.h>"),
        ("csrc/cuda/kernels/x.cu", '#include "cuda/kernels/gemm_tile.cuh"'),
        ("csrc/cuda/kernels/x.h", '#include "cuda/kernels/gemm.h"'),
        ("csrc/cuda/plan/x.cpp", '#include "cuda/kernels/gemm.h"'),
        ("csrc/bindings/x.cpp", "#include <c10/cuda/CUDAStream.h>"),
    ],
)
def test_include_rules_accept(path, line):
    assert forbidden_includes(path, line) == []


def test_one_file_asks_for_the_version_of_torch():
    version = re.compile(r"TORCH_VERSION_|DYKAF_TORCH_FROM|torch/version\.h")
    asking = [path for path in package_sources() if version.search((ROOT / path).read_text())]
    assert asking == ["csrc/aten/torch_compat.h"]


# What was built ---------------------------------------------------------------------------------


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


def test_module_and_python_file_say_the_same():
    assert dykaf._C.build_info() == _build_info.BUILD_INFO
    assert _build_info.BUILD_INFO["torch"] == torch.__version__


def missing_report_rows(report: str) -> list[str]:
    expected = {
        "dykaf": re.escape(dykaf.__version__),
        "backends": "cpu for tensors on the CPU, (cuda for .+, )?aten .+ for all others",
        "cuda": ".*CUDA is (not )?built: .+",
        "architectures": r"none|\d.+",
        "torch": re.escape(torch.__version__) + r" \(CUDA .+\)",
        "compiler": r"\w+ \d+.*",
        "threads": r"[1-9]\d*",
    }
    rows = (rf"{name} +({value})" for name, value in expected.items())
    return [row for row in rows if not re.search(f"^{row}$", report, re.MULTILINE)]


def test_report():
    result = run_python("-m", "dykaf")
    assert result.returncode == 0, result.stderr
    assert missing_report_rows(result.stdout) == []


def test_report_check_rejects():
    report = run_python("-m", "dykaf").stdout
    assert len(missing_report_rows(report.replace("threads", "thread"))) == 1
    assert len(missing_report_rows(report.replace(dykaf.__version__, "9.9.9"))) == 1


def num_openmp_runtimes(maps: str) -> int:
    return len(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*", maps)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime():
    code = "import dykaf; dykaf._C; print(open('/proc/self/maps').read())"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert num_openmp_runtimes(result.stdout) == int(torch.backends.openmp.is_available())


def test_openmp_count_rejects():
    assert num_openmp_runtimes("1 /a/torch/lib/libgomp.so.1\n2 /usr/lib/libgomp.so.1.0.0\n") == 2


def test_module_is_parallel():
    """Without -fopenmp at::parallel_for is a serial loop, and nothing asks for GOMP_parallel."""
    module = Path(dykaf._C.__file__).read_bytes()
    assert (b"GOMP_parallel" in module or b"kmpc" in module) == torch.backends.openmp.is_available()


def test_module_has_no_path_of_the_build_machine():
    library_dir = str(Path(torch.__file__).parent / "lib").encode()
    assert library_dir not in Path(dykaf._C.__file__).read_bytes()


# Where a library is looked for is left to the process, which has loaded torch's.
SYSTEM_LIBRARIES = r"lib(stdc\+\+|gcc_s|m|c|pthread|dl)\.so\.\d+|ld-linux.*"
TORCH_LIBRARIES = r"lib(c10|torch|torch_cpu|torch_python)\.so"
CUDA_LIBRARIES = r"lib(c10_cuda|torch_cuda)\.so|libcudart\.so\.\d+"


def faults_of_links(dynamic: str, has_cuda: bool) -> list[str]:
    """Returns what `readelf --dynamic` says that the module must not have."""
    allowed = f"{SYSTEM_LIBRARIES}|{TORCH_LIBRARIES}" + (f"|{CUDA_LIBRARIES}" if has_cuda else "")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic)
    return paths + [name for name in needed if not re.fullmatch(allowed, name)]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_what_the_module_links():
    command = ["readelf", "--dynamic", "--wide", dykaf._C.__file__]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "[libtorch_python.so]" in dynamic
    assert faults_of_links(dynamic, has_cuda=bool(_build_info.BUILD_INFO["cuda"])) == []


@pytest.mark.parametrize(
    ("line", "has_cuda"),
    [
        ("(RUNPATH)  Library runpath: [/a/torch/lib]", False),
        ("(RPATH)  Library rpath: [$ORIGIN]", True),
        ("(NEEDED)  Shared library: [libcudart.so.13]", False),
        ("(NEEDED)  Shared library: [libtorch_cuda.so]", False),
        ("(NEEDED)  Shared library: [libgomp.so.1]", True),
    ],
)
def test_links_reject(line, has_cuda):
    good = "(NEEDED)  Shared library: [libtorch.so]\n(NEEDED)  Shared library: [libc.so.6]\n"
    assert faults_of_links(good, has_cuda) == []
    assert len(faults_of_links(good + line, has_cuda)) == 1


def test_every_package_is_installed() -> None:
    """An editable installation would work without."""
    line = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line is not None
    folders = {path.parent for path in (ROOT / "python" / "dykaf").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT / "python").parts) for folder in folders}
    assert set(re.findall(r'"([^"]+)"', line[1])) == names
