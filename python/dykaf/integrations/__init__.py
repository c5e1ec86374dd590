"""DyKAF in the tools people train with: a module for each, which needs that tool.

docs/recipes has a page for each. Nothing here is imported before you do it.
"""

from importlib.util import find_spec


def require(package: str) -> None:
    """Checks that the tool of a module is installed.

    Raises:
        ImportError: with the name that pip knows it by.
    """
    if find_spec(package) is None:
        raise ImportError(f"dykaf.integrations.{package} needs {package}: pip install {package}")
