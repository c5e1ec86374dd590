"""What the extension module was built for, and whether it fits the torch that runs."""

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

# Without a cache: pip and uv keep what they built, and would give the same module again.
REBUILD = {
    "pip": "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir",
    "uv": "uv pip install --reinstall --no-deps --no-build-isolation --no-cache",
}


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
            f"dykaf was built against torch {built}, but torch {running} is running; "
            f"to build it again in this environment, {rebuild_command()}"
        )


def rebuild_command() -> str:
    """Returns what to type to build again: in the source tree, or from where pip installed."""
    tree = Path(__file__).resolve().parents[2]
    if (tree / "setup.py").is_file():  # built in place, or an editable installation
        return f"type: cd {shlex.quote(str(tree))} && python setup.py build_ext --inplace"
    try:
        distribution = importlib.metadata.distribution("dykaf")
    except importlib.metadata.PackageNotFoundError:
        return f"in its source tree, type: {REBUILD['pip']} ."
    installer = (distribution.read_text("INSTALLER") or "pip").strip()
    command = REBUILD.get(installer, REBUILD["pip"])
    source = installed_from(json.loads(distribution.read_text("direct_url.json") or "{}"))
    if source is None:
        return f"in its source tree, type: {command} ."
    return f"type: {command} {shlex.quote(source)}"


def installed_from(direct_url: dict[str, object]) -> str | None:
    """Returns the source that an installer recorded, if another build from it is possible.

    Args:
        direct_url: The content of direct_url.json; empty if there is none.
    """
    url = direct_url.get("url")
    if not isinstance(url, str) or url.endswith(".whl"):
        return None
    vcs = direct_url.get("vcs_info")
    if isinstance(vcs, dict):
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    parts = urlsplit(url)
    if parts.scheme != "file":
        return url
    path = unquote(parts.path)
    return path if Path(path).exists() else None
