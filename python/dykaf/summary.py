"""How an optimizer treats each parameter, as a table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dykaf.checks import param_name
from dykaf.engine import KroneckerOptimizer
from dykaf.state import Layout

_HEADINGS = ("parameter", "shape", "count", "treatment", "lr", "weight decay", "state")
_PLACE = re.compile(r"(param_groups\[\d+\])\['params'\]\[\d+\]")
# Of blocks: parts of a name (`layers.3.`) and ends of a module's (`encoder_layer_3.`).
_NUMBERS = re.compile(r"(^|\.)\d+(?=\.|$)|(?<=_)\d+(?=\.)")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Row:
    """Parameters that differ by the numbers in their names alone."""

    name: str  # * for those numbers
    shape: tuple[int, ...]
    count: int
    treatment: str
    lr: float
    weight_decay: float
    state_bytes: int  # of all of them, by the time each has had a gradient

    @property
    def num_elements(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)

    def cells(self) -> tuple[str, ...]:
        """What the table says."""
        return (
            self.name,
            " x ".join(map(str, self.shape)) or "scalar",
            str(self.count),
            self.treatment,
            f"{self.lr:.4g}",
            f"{self.weight_decay:.4g}",
            _in_bytes(self.state_bytes),
        )


@dataclass(frozen=True)
class Summary:
    """Rows in the optimizer's order; ``str`` makes a table of them."""

    rows: list[Row]

    @property
    def state_bytes(self) -> int:
        """Of all rows; of sharded parameters, over all processes together."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [_HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.ljust(width)
                if heading in ("parameter", "shape", "treatment")
                else cell.rjust(width)
                for heading, cell, width in zip(_HEADINGS, line, widths, strict=True)
            )
            for line in lines
        ]
        return "\n".join([*table, self._totals()])

    def _totals(self) -> str:
        sizes: Counter[str] = Counter()
        for row in self.rows:
            sizes[row.treatment] += row.num_elements
        total = sum(sizes.values())
        shares = "; ".join(f"{size:,} {treatment}" for treatment, size in sizes.most_common())
        each = f" ({self.state_bytes / total:.1f} bytes each)" if total else ""
        return f"{total:,} parameters: {shares}\nstate: {_in_bytes(self.state_bytes)}{each}"


def summary(optimizer: KroneckerOptimizer, model: nn.Module | None = None) -> Summary:
    """How each parameter is treated, its shape, rate, weight decay and bytes of state.

    A treatment is "one-sided", "both sides" or "no basis" (which factors a matrix keeps), "rank-32"
    (``skinny_rank`` applies), each with "stack of 8" before it where the matrices of a tensor are
    apart; "AdamW" for all else, with "no decay" where there is none; or "frozen",
    "no elements" or "no shape yet" (of a lazy module).

    .. code-block:: python

        print(dykaf.summary(optimizer))

    Args:
        optimizer: before or after its first step.
        model: whose names are taken for parameters that have none in the groups.

    Raises:
        TypeError: for an optimizer of another class.
    """
    if not isinstance(optimizer, KroneckerOptimizer):
        raise TypeError(f"optimizer: expected a DyKAF or FISMO, got {type(optimizer).__name__}")
    model_names = (
        {param: name for name, param in model.named_parameters()} if model is not None else {}
    )
    counts: Counter[Row] = Counter()
    for group_idx, group in enumerate(optimizer.param_groups):
        for idx, param in enumerate(group["params"]):
            name = param_name(group, group_idx, idx)
            if "param_names" not in group:
                name = model_names.get(param, name)
            counts[_row(name, param, group)] += 1
    rows = [
        Row(**{**vars(row), "count": count, "state_bytes": count * row.state_bytes})
        for row, count in counts.items()
    ]
    return Summary(rows)


def _row(name: str, param: Tensor, group: Mapping[str, Any]) -> Row:
    layout = Layout.of(param, group)
    name = _PLACE.sub(r"\1", name)
    has_state = param.requires_grad and not is_lazy(param) and param.numel() > 0
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layout.shapes().values()]
    return Row(
        _NUMBERS.sub(lambda found: f"{found[1] or ''}*", name),
        layout.shape,
        1,
        _treatment(param, layout, group),
        float(group["lr"]),
        float(group["weight_decay"]),
        sum(sizes) if has_state else 0,
    )


def _treatment(param: Tensor, layout: Layout, group: Mapping[str, Any]) -> str:
    if not param.requires_grad:
        return "frozen"
    if is_lazy(param) or param.numel() == 0:
        return "no shape yet" if is_lazy(param) else "no elements"
    if not layout.is_matrix:
        treatment = "AdamW"
    elif layout.skinny_rank:
        treatment = f"rank-{layout.skinny_rank}"
    elif layout.left and layout.right:
        treatment = "both sides"
    else:
        treatment = "one-sided" if layout.has_factors else "no basis"
    before = f"stack of {layout.count}, " if layout.batch else ""
    after = ", no decay" if group["weight_decay"] == 0 else ""
    return before + treatment + after


def _in_bytes(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{size} B"
