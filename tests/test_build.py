"""The build: who may include whom, what the build says, and how it stops.

Each check is a function that is also run on a case it must reject.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

import dykaf
from dykaf import _build, _build_info

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
    "csrc/cpu": [STD, OWN, TORCH],
    "csrc/cuda/kernels": [STD, OWN, CUDA],
    "csrc/cuda/plan": [STD, OWN, PLAIN],
    "csrc/bindings": [STD, OWN, TORCH, CUDA, r"Python\.h", r"cpu/.+"],  # it calls down, never up
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
        ("csrc/cuda/kernels/x.cu", "#include <cuda_bf16.h>"),
        ("csrc/cuda/kernels/x.cu", '#include "cuda/kernels/gemm_tile.cuh"'),
        ("csrc/cuda/kernels/x.h", '#include "cuda/kernels/gemm.h"'),
        ("csrc/cuda/plan/x.cpp", '#include "cuda/kernels/gemm.h"'),
        ("csrc/bindings/x.cpp", "#include <c10/cuda/CUDAStream.h>"),
    ],
)
def test_include_rules_accept(path, line):
    assert forbidden_includes(path, line) == []


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
        "backends": "cpu(, cuda)?",
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


# The torch it was built against -------------------------------------------------------------------


def test_same_torch_is_accepted():
    _build.check_torch()


@pytest.mark.parametrize("running", ["9.9.9", torch.__version__.split("+")[0] + "+other"])
def test_other_torch_is_refused(monkeypatch, running):
    monkeypatch.setattr(torch, "__version__", running)
    with pytest.raises(ImportError) as caught:
        _build.check_torch()
    message = str(caught.value)
    assert f"built against torch {_build_info.BUILD_INFO['torch']}" in message
    assert f"torch {running} is running" in message
    assert "pip install --no-build-isolation" in message


def test_other_torch_is_refused_before_the_module_is_loaded():
    code = (
        "import sys, torch; torch.__version__ = '9.9.9'\n"
        "try:\n    import dykaf\n"
        "except ImportError as error:\n    print(error, '| loaded:', 'dykaf._C' in sys.modules)\n"
    )
    result = run_python("-c", code)
    assert "torch 9.9.9 is running" in result.stdout
    assert result.stdout.rstrip().endswith("loaded: False")


def test_missing_build_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dykaf._build_info", None)
    with pytest.raises(ImportError, match="dykaf was not built"):
        _build.check_torch()


# setup.py -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("dykaf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
def test_setup_without_torch_stops_with_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    out = tmp_path / "out"
    out.mkdir()
    target = ["--build-lib" if command == "build_ext" else "--output-dir", str(out)]
    script = str(ROOT / "setup.py")
    result = run_python(script, "--quiet", command, *target, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "no torch here" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert list(out.iterdir()) == []


def test_setup_with_torch_does_not_stop(setup_py):
    setup_py.require_torch()


@pytest.mark.parametrize("version", ["2.12.1", "2.15.0", "1.13.0+cu117"])
def test_another_version_of_torch_stops(setup_py, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    expected = f"torch {version} is installed, and 2.13 or later, below 2.15 is needed"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        setup_py.require_torch()
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert requirement == "torch>=2.13,<2.15"


def test_the_nvcc_of_cuda_home_comes_before_that_on_path(setup_py, monkeypatch, tmp_path):
    for name in ("cudacxx", "home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        tool = tmp_path / name / "bin" / "nvcc"
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert setup_py.find_nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "cudacxx" / "bin" / "nvcc"))
    assert setup_py.find_nvcc() == str(tmp_path / "cudacxx" / "bin" / "nvcc")


def test_the_sdist_holds_what_the_repository_holds(tmp_path):
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path / "copy"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # not while a file is being removed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    expected = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    expected = {name for name in expected if not name.startswith((".ci/", ".git", ".pre-commit"))}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)],
        cwd=copy,
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    assert expected <= found


def test_old_setuptools_stops(setup_py, monkeypatch):
    setup_py.require_setuptools()
    monkeypatch.setattr(setup_py.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 65.5.0 is too old; type: pip install"):
        setup_py.require_setuptools()


def test_unknown_dykaf_cuda_stops_with_one_line(tmp_path):
    target = str(tmp_path / "out")
    args = (str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", target)
    result = run_python(*args, DYKAF_CUDA="yes")
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["dykaf: DYKAF_CUDA: expected auto, on or off, got 'yes'"]


CPU_TORCH = ("2.13.0+cpu", None)
CUDA_TORCH = ("2.14.1+cu130", "13.0")


@pytest.mark.parametrize(
    ("torch_build", "num_sources", "nvcc", "reason"),
    [
        (CPU_TORCH, 3, "13.0", "torch 2.13.0+cpu is not a CUDA build"),
        (CUDA_TORCH, 0, "13.0", "no CUDA sources"),
        (CUDA_TORCH, 3, None, "nvcc was not found"),
        (CUDA_TORCH, 3, "12.8", "nvcc is 12.8, but torch 2.14.1+cu130 was built with CUDA 13.0"),
    ],
)
def test_cuda_is_not_built(setup_py, torch_build, num_sources, nvcc, reason):
    with_cuda, line = setup_py.decide_cuda("auto", *torch_build, num_sources, nvcc)
    assert not with_cuda
    assert line.startswith("CUDA is not built: ")
    assert reason in line
    with pytest.raises(SystemExit, match=f"DYKAF_CUDA=on, but .*{re.escape(reason)}"):
        setup_py.decide_cuda("on", *torch_build, num_sources, nvcc)


@pytest.mark.parametrize("nvcc", ["13.0", "13.2"])
def test_cuda_is_built(setup_py, nvcc):
    for mode in ("auto", "on"):
        assert setup_py.decide_cuda(mode, *CUDA_TORCH, 3, nvcc) == (
            True,
            f"CUDA is built: nvcc {nvcc}, torch 2.14.1+cu130",
        )
    assert setup_py.decide_cuda("off", *CUDA_TORCH, 3, nvcc)[0] is False


def test_architectures(setup_py):
    assert setup_py.parse_archs("8.0;9.0+PTX") == "8.0 9.0+PTX"
    assert setup_py.parse_archs(" 9.0a, 10.0 ") == "9.0a 10.0"
    assert setup_py.parse_archs("7.5;8.6;12.0+PTX") == "8.6 12.0+PTX"
    for bad in ("Hopper", "sm_90", "90", "8.0;PTX", "7.0;7.5"):
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected"):
            setup_py.parse_archs(bad)
