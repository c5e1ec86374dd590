"""Builds the package with its CUDA backend over the host executor: `simt`, for tests only.

    python tests/simt/extension.py

The package in build/simt/package takes tensors on the CPU for tensors on a GPU, so that the very
kernels, plans and bindings run:

    PYTHONPATH=build/simt/package python -m pytest --backend simt tests/test_ops.py
"""

import shutil
import sysconfig
from pathlib import Path

import torch
from build import CUDA_SOURCES, HOST_FLAGS, INCLUDES, OUT, ROOT, SIMT, Object, make
from torch.utils import cpp_extension

PACKAGE = OUT / "package" / "dykaf"
HOST_SOURCES = sorted(
    source for folder in ("aten", "cpu", "bindings") for source in ROOT.glob(f"csrc/{folder}/*.cpp")
)
HOST_SOURCES += [SIMT / "cublas_on_host.cpp", SIMT / "faulty_allocator.cpp"]
DEFINITIONS = {
    "DYKAF_WITH_CUDA": "1",
    "DYKAF_SIMT": "1",
    "DYKAF_VERSION": '"0"',
    "DYKAF_TORCH_VERSION": f'"{torch.__version__}"',
    "DYKAF_CUDA_VERSION": '"on the host"',
    "DYKAF_CUDA_ARCHS": '""',
    "DYKAF_COMPILER": '"g++"',
    "TORCH_API_INCLUDE_EXTENSION_H": "1",
    "TORCH_EXTENSION_NAME": "_C",
    "_GLIBCXX_USE_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
}


def build() -> Path:
    """Makes the package; returns the folder for PYTHONPATH."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = [
        *HOST_FLAGS,
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
    flags += [f"-D{name}={value}" for name, value in DEFINITIONS.items()]
    includes_flags = [*INCLUDES, *(flag for path in includes for flag in ("-isystem", path))]
    objects = [Object(source, "release", OUT / "release") for source in CUDA_SOURCES]
    for source in HOST_SOURCES:
        folder = OUT / "package" / source.parent.name
        objects.append(Object(source, "release", folder, tuple(includes_flags), tuple(flags)))
    PACKAGE.mkdir(parents=True, exist_ok=True)
    python = ROOT / "python" / "dykaf"
    for source in (*python.rglob("*.py*"), python / "products.txt"):
        if "__pycache__" not in source.parts:
            target = PACKAGE / source.relative_to(python)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    make(objects, PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", ["-shared", *libraries])
    return PACKAGE.parent


if __name__ == "__main__":
    print(build())
