"""What the extension module was built for, and whether it fits the torch that runs."""

import torch


def build_info() -> dict[str, str]:
    """Reads the facts of the build without loading the extension module.

    Returns:
        version, torch, cuda, cuda_archs and compiler; cuda and cuda_archs are empty in a CPU build.

    Raises:
        ImportError: If the package was not built.
    """
    try:
        from dykaf._build_info import BUILD_INFO
    except ModuleNotFoundError as error:
        raise ImportError(
            "dykaf was not built: in its source tree, type: pip install --no-build-isolation ."
        ) from error
    return BUILD_INFO


def check_torch() -> None:
    """Compares the torch that the extension was built against with the one that runs.

    The extension uses torch's C++ interface, which may change with any version and differs between
    the CPU and the CUDA build of one version. The check does not load the extension: built for
    another torch it may fail to load, with an undefined symbol and no reason.

    Raises:
        ImportError: If they differ, or if the package was not built.
    """
    built = build_info()["torch"]
    running = str(torch.__version__)
    if built != running:
        raise ImportError(
            f"dykaf was built against torch {built}, but torch {running} is running; build it "
            "again in this environment: in its source tree, type: "
            "pip install --no-build-isolation --no-deps --force-reinstall ."
        )
