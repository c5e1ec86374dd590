"""DyKAF: an optimizer that follows a Kronecker approximation of the Fisher matrix."""

from dykaf._build import build_info, check_torch

check_torch()

# E402: after it, for another torch may make the first import of dykaf._C fail.
from dykaf.engine import describe_plan  # noqa: E402
from dykaf.fismo import FISMO  # noqa: E402
from dykaf.optimizer import DyKAF  # noqa: E402
from dykaf.param_groups import param_groups  # noqa: E402
from dykaf.presets import preset  # noqa: E402
from dykaf.summary import summary  # noqa: E402

__version__ = build_info()["version"]
__all__ = ["FISMO", "DyKAF", "__version__", "describe_plan", "param_groups", "preset", "summary"]
