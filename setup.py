"""Builds dykaf._C by a call of CMake; name, version and metadata are in pyproject.toml.

Environment variables: DYKAF_CUDA (auto, on or off), TORCH_CUDA_ARCH_LIST (default 8.0;9.0+PTX),
DYKAF_SANITIZE (for example address,undefined), MAX_JOBS, CXX, CXXFLAGS, CUDACXX.

`python setup.py build_ext --inplace` also works with a setuptools too old for pyproject.toml.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0+PTX"
MIN_ARCH = 80  # of the kernels: cp.async and the TF32 products
TORCH_FROM = (2, 6)  # the oldest that is tested; also in pyproject.toml
TORCH_NEWEST_TESTED = (2, 15)
MIN_SETUPTOOLS = 77  # the first to know SPDX license expressions; also in pyproject.toml


def stop(message: str) -> NoReturn:
    """Ends the build with one line and no traceback."""
    sys.exit(f"dykaf: {message}")


def require_torch() -> None:
    """Stops where torch cannot be imported, as in pip's isolated builds, or is another version.

    pip would build against that one and then replace it with one that the module does not fit.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of torch is missing
        stop(
            f"the build needs the torch that dykaf will run with, and cannot import it ({error}); "
            "in an environment that has torch, type: "
            f'pip install "setuptools>={MIN_SETUPTOOLS}" cmake ninja && '
            "pip install --no-build-isolation ."
        )
    if minor_version(torch.__version__) < TORCH_FROM:
        expected = ".".join(map(str, TORCH_FROM))
        stop(f"torch {torch.__version__} is installed, and {expected} or later is needed")


def minor_version(torch_version: str) -> tuple[int, ...]:
    """Returns (2, 13) for "2.13.0+cpu"."""
    return tuple(map(int, torch_version.split(".")[:2]))


def hint_of_new(torch_version: str) -> str:
    """Returns what to add to a failure of the build, if torch is newer than what is tested."""
    if minor_version(torch_version) <= TORCH_NEWEST_TESTED:
        return ""
    newest = ".".join(map(str, TORCH_NEWEST_TESTED))
    return f"; torch {torch_version} is newer than {newest}, the last that is tested"


def build_tag(torch_version: str) -> str:
    """Returns the build tag of a wheel, which names the torch that the wheel belongs to.

    A tag, not a local version: the version of a wheel must be that of the sdist it is built from.
    """
    return "0torch" + re.sub(r"[^A-Za-z0-9.]", "_", torch_version)


def project_version() -> str:
    """Reads the version in pyproject.toml, which an old setuptools does not."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "(.+?)"', text, re.MULTILINE)
    return match[1] if match else stop("pyproject.toml names no version")


def is_old_setuptools() -> bool:
    """Tells whether setuptools cannot read pyproject.toml."""
    return int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS


def require_setuptools() -> None:
    """Stops where setuptools cannot read pyproject.toml; a new venv may bring such an old one."""
    if is_old_setuptools():
        stop(
            f"setuptools {setuptools.__version__} is too old; "
            f'type: pip install "setuptools>={MIN_SETUPTOOLS}" cmake ninja'
        )


def find_tool(name: str) -> str:
    """Finds cmake or ninja beside this Python (a venv need not be activated), then on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return path or stop(f"{name} was not found; type: pip install {name}")


def find_nvcc() -> str | None:
    """Finds nvcc: by CUDACXX, CUDA_HOME, CUDA_PATH, on PATH, where CUDA is usually installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def nvcc_version(nvcc: str) -> str:
    """Returns the release of nvcc, for example "13.0", or "unknown"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def decide_cuda(
    mode: str, torch_version: str, torch_cuda: str | None, num_sources: int, nvcc: str | None
) -> tuple[bool, str]:
    """Decides whether to build the CUDA sources.

    Args:
        mode: The value of DYKAF_CUDA.
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda.
        num_sources: How many files with kernels there are.
        nvcc: The release of nvcc, or None if there is none.

    Returns:
        Whether to build them, and why, in one line. Stops the build if mode is "on" and they cannot
        be built, or if mode is none of the three words.
    """
    if mode not in ("auto", "on", "off"):
        stop(f"DYKAF_CUDA: expected auto, on or off, got {mode!r}")
    if mode == "off":
        return False, "CUDA is not built: DYKAF_CUDA=off"
    if torch_cuda is None:
        problem = f"torch {torch_version} is not a CUDA build"
    elif num_sources == 0:
        problem = "this version has no CUDA sources"
    elif nvcc is None:
        problem = "nvcc was not found (CUDACXX, PATH, CUDA_HOME)"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"nvcc is {nvcc}, but torch {torch_version} was built with CUDA {torch_cuda}"
    else:
        return True, f"CUDA is built: nvcc {nvcc}, torch {torch_version}"
    if mode == "on":
        stop(f"DYKAF_CUDA=on, but CUDA cannot be built: {problem}")
    return False, f"CUDA is not built: {problem}"


def parse_archs(value: str) -> str:
    """Checks TORCH_CUDA_ARCH_LIST; returns what the kernels can run on, separated by spaces."""
    archs = []
    for arch in re.split(r"[;,\s]+", value.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if not match:
            stop(f"TORCH_CUDA_ARCH_LIST: expected numbers as in {DEFAULT_ARCHS!r}, got {arch!r}")
        if int(match[1] + match[2]) >= MIN_ARCH:
            archs.append(arch)
    if not archs:
        stop(f"TORCH_CUDA_ARCH_LIST: expected an architecture from 8.0 on, got {value!r}")
    return " ".join(archs)


def build_module(version: str, target_dir: Path) -> None:
    """Builds the module and puts it, with _build_info.py, into target_dir."""
    require_torch()
    import torch

    nvcc = find_nvcc()
    with_cuda, decision = decide_cuda(
        os.environ.get("DYKAF_CUDA", "auto"),
        torch.__version__,
        torch.version.cuda,
        len(list(ROOT.glob("csrc/cuda/**/*.cu"))),
        nvcc and nvcc_version(nvcc),
    )
    print(f"dykaf: building against torch {torch.__version__}; {decision}", flush=True)
    from torch.utils import cpp_extension  # late: it logs a search for CUDA of its own

    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        stop(f"Python.h is not in {python_include}; install the headers of Python (python3-dev)")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sanitize = os.environ.get("DYKAF_SANITIZE", "")
    ninja = find_tool("ninja")
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": ninja,
        "DYKAF_VERSION": version,
        "DYKAF_TORCH_VERSION": torch.__version__,
        "DYKAF_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
        "DYKAF_TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
        "DYKAF_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        "DYKAF_OPENMP": int(torch.backends.openmp.is_available()),
        "DYKAF_PYTHON_INCLUDE_DIR": python_include,
        "DYKAF_EXT_SUFFIX": suffix,
        "DYKAF_CUDA": int(with_cuda),
        "DYKAF_CUDA_ARCHS": "",
        "DYKAF_CUDA_DECISION": decision,
        "DYKAF_SANITIZE": sanitize,
    }
    if with_cuda:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        definitions |= {"CMAKE_CUDA_COMPILER": nvcc, "DYKAF_CUDA_ARCHS": parse_archs(archs)}
    # One build directory per torch and per everything that CMake settles once, so that a second
    # build is incremental and a change of torch or compiler, or a moved checkout, starts afresh.
    settings = [str(ROOT), sys.prefix, suffix, sanitize, nvcc if with_cuda else None]
    settings += [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS")]
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    torch_name = re.sub(r"[^A-Za-z0-9.]+", "-", torch.__version__)
    build_dir = ROOT / "build" / f"torch-{torch_name}-{key}"

    cmake = find_tool("cmake")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    print(f"dykaf: compiling in {build_dir}, {jobs} at a time (MAX_JOBS)", flush=True)
    begin = time.monotonic()
    for command in (configure, [cmake, "--build", str(build_dir), "--parallel", jobs]):
        if subprocess.run(command).returncode != 0:
            stop(f"CMake failed; the reason is printed above{hint_of_new(torch.__version__)}")
    target_dir.mkdir(parents=True, exist_ok=True)
    for name in (f"_C{suffix}", "_build_info.py"):
        # Removed first: a process may have the old module mapped.
        (target_dir / name).unlink(missing_ok=True)
        shutil.copy2(build_dir / name, target_dir / name)
    seconds = time.monotonic() - begin
    print(f"dykaf: built {target_dir / f'_C{suffix}'} in {seconds:.0f} s", flush=True)


class BuildExt(build_ext):
    """Runs CMake in place of the compiler calls of setuptools."""

    def run(self) -> None:
        """Builds into the source tree (editable) or into build_lib (a wheel)."""
        target = ROOT / "python" if self.inplace else Path(self.build_lib)
        build_module(self.distribution.get_version(), target / "dykaf")


class BuildPy(build_py):
    """Starts from an empty build_lib, so that no file of an older build gets into a wheel."""

    def run(self) -> None:
        """Empties build_lib and copies the Python files."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class DistInfo(dist_info):
    """Stops early without torch: pip asks for the metadata before it downloads what they name."""

    def run(self) -> None:
        """Checks for torch and writes the metadata."""
        require_torch()
        super().run()


def main() -> None:
    """Builds in place without a look at pyproject.toml, or hands over to setuptools."""
    if is_old_setuptools() and {"build_ext", "--inplace"} <= set(sys.argv[1:]):
        build_module(project_version(), ROOT / "python" / "dykaf")
        return
    require_setuptools()
    from setuptools.command.bdist_wheel import bdist_wheel  # an old setuptools has none

    class BdistWheel(bdist_wheel):
        """Names the torch in the name of the wheel."""

        def finalize_options(self) -> None:
            require_torch()
            import torch

            self.build_number = build_tag(torch.__version__)
            super().finalize_options()

    commands = {"build_ext": BuildExt, "build_py": BuildPy, "dist_info": DistInfo}
    setup(
        ext_modules=[Extension("dykaf._C", sources=[])],
        cmdclass={**commands, "bdist_wheel": BdistWheel},
    )


if __name__ == "__main__":
    main()
