"""The optimizer state of one parameter: its layout, creation and checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

State = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

PARAM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Group options that decide the layout; they cannot change once a parameter has state (integrator:
# where skinny_rank applies).
STRUCTURAL_OPTIONS = (
    "max_precond_dim",
    "sides",
    "skinny_rank",
    "integrator",
    "batch_dims",
    "second_moment",
    "state_dtype",
    "low_precision",
)

# Long over short side from which `skinny_rank` applies.
SKINNY_RATIO = 16

# Kept on the CPU for parameters anywhere: what decides which bases a step refreshes.
HOST_KEYS = ("next_refresh", "refreshes", "schedule_step", "rows")

# In float64 where the device has it.
SCALE_KEYS = ("rho", "exp_avg_sq_scale")

# state_bytes() by kind.
KINDS = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "exp_avg_sq_row": "exp_avg_sq",
    "exp_avg_sq_col": "exp_avg_sq",
    "exp_avg_sq_scale": "exp_avg_sq",
    "L": "factors",
    "R": "factors",
    "Q_L": "bases",
    "Q_R": "bases",
    "core": "factors",
    "basis": "bases",
    "master": "master",
}


def num_batch_dims(shape: Sequence[int], batch_dims: int | None) -> int:
    """How many leading dimensions of a shape index separate matrices.

    Args:
        shape: of a parameter.
        batch_dims: the option. A tensor without that many beside two gives what it has. None: all
            but the last two, where none of them is longer than either of these; so stacks of
            experts have them, and kernels of convolutions do not.
    """
    num_leading = max(len(shape) - 2, 0)
    if batch_dims is not None:
        return min(batch_dims, num_leading)
    is_stack = num_leading > 0 and max(shape[:-2]) <= min(shape[-2:])
    return num_leading if is_stack else 0


def shape_of(param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter; an empty one for that of a lazy module before its first input."""
    return (0,) if is_lazy(param) else param.shape


@dataclass(frozen=True)
class Layout:
    """How a parameter is seen: a stack of ``count`` matrices, m x n, with the factors it keeps.

    With ``skinny_rank`` > 0 the factor of the long side is kept at that rank; ``left`` or ``right``
    names the short side then. What is no matrix (a vector, a scalar, or both sides over
    ``max_precond_dim``) keeps its own shape and is updated by AdamW.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    m: int
    n: int
    is_matrix: bool
    left: bool
    right: bool
    dtype: torch.dtype
    factor_dtype: torch.dtype  # of factors and bases
    scale_dtype: torch.dtype  # of the numbers in SCALE_KEYS
    second_moment: str
    master: bool
    skinny_rank: int = 0

    @classmethod
    def of(cls, param: Tensor, group: Mapping[str, Any]) -> Layout:
        """The layout of ``param`` under the structural options of ``group``."""
        shape = tuple(shape_of(param))
        skinny_rank = int(group["skinny_rank"])
        batch_dims = num_batch_dims(shape, group["batch_dims"])
        batch, matrix = shape[:batch_dims], shape[batch_dims:]
        has_sides = len(matrix) >= 2
        m, n = (matrix[0], math.prod(matrix[1:])) if has_sides else (1, math.prod(shape))
        left = has_sides and m <= group["max_precond_dim"]
        right = has_sides and n <= group["max_precond_dim"]
        is_matrix = left or right
        is_skinny = (
            left
            and right
            and group["sides"] != "none"
            and group["integrator"] == "diagonal"
            and min(m, n) <= skinny_rank
            and max(m, n) >= max(2 * skinny_rank, SKINNY_RATIO * min(m, n))
        )
        if group["sides"] == "none":
            left = right = False
        elif group["sides"] == "one" and left and right and not is_skinny:
            left, right = m <= n, m > n
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        low_precision = param.dtype in (torch.bfloat16, torch.float16)
        return cls(
            shape=shape,
            batch=batch if is_matrix else (),
            m=m,
            n=n,
            is_matrix=is_matrix,
            left=left and not (is_skinny and m > n),
            right=right and not (is_skinny and m < n),
            dtype=dtype,
            factor_dtype=torch.bfloat16 if group["state_dtype"] == "bfloat16" else dtype,
            scale_dtype=torch.float32 if param.device.type == "mps" else torch.float64,
            second_moment=group["second_moment"] if is_matrix and not is_skinny else "full",
            master=low_precision and group["low_precision"] == "master",
            skinny_rank=skinny_rank if is_skinny else 0,
        )

    @property
    def has_factors(self) -> bool:
        """Whether a factor of either side is kept."""
        return self.left or self.right

    @property
    def refresh_costs(self) -> tuple[int, int]:
        """Of the left and the right side, relative to each other; 0 without a factor."""
        thin = self.skinny_rank**2 * max(self.m, self.n)
        return self.m**3 if self.left else thin, self.n**3 if self.right else thin

    @property
    def count(self) -> int:
        """The number of matrices in the stack."""
        return math.prod(self.batch)

    def shapes(self) -> Shapes:
        """Name, shape and dtype of each state tensor."""
        batch, m, n, dtype = self.batch, self.m, self.n, self.dtype
        shapes: Shapes = {
            "step": (batch, torch.float32),
            "update_rms": (batch, torch.float32),
        }
        full = (*batch, m, n) if self.is_matrix else self.shape
        shapes["exp_avg"] = (full, dtype)
        if self.skinny_rank:
            short, long, rows = min(m, n), max(m, n), 2 * self.skinny_rank
            shapes["exp_avg_sq"] = ((*batch, short, self.skinny_rank + 1), dtype)
            shapes["basis"] = ((*batch, rows, long), self.factor_dtype)
            shapes["core"] = ((*batch, rows, rows), self.factor_dtype)
            shapes["flat"] = (batch, dtype)
            shapes["rows"] = ((*batch, 2), torch.int64)
        elif self.second_moment == "full":
            shapes["exp_avg_sq"] = (full, dtype)
        elif self.second_moment != "none":
            shapes["exp_avg_sq_row"] = ((*batch, m), dtype)
            shapes["exp_avg_sq_col"] = ((*batch, n), dtype)
        if self.second_moment == "rank_one":
            shapes["exp_avg_sq_scale"] = (batch, self.scale_dtype)
        if self.left:
            shapes["L"] = shapes["Q_L"] = ((*batch, m, m), self.factor_dtype)
        if self.right:
            shapes["R"] = shapes["Q_R"] = ((*batch, n, n), self.factor_dtype)
        if self.is_matrix:
            shapes["rho"] = ((*batch, 2), self.scale_dtype)
        if self.has_factors:
            shapes["next_refresh"] = shapes["refreshes"] = ((*batch, 2), torch.int64)
            shapes["schedule_step"] = shapes["refresh_fallbacks"] = (batch, torch.int64)
        if self.master:
            shapes["master"] = (self.shape, torch.float32)
        return shapes


def new_state(param: Tensor, layout: Layout) -> State:
    """Zero state for ``param``; the first gradient sets factors and bases. ``master`` is a copy."""
    with torch.inference_mode(False):  # tensors made in that mode cannot be changed outside of it
        state = {
            name: torch.zeros(
                shape, dtype=dtype, device="cpu" if name in HOST_KEYS else param.device
            )
            for name, (shape, dtype) in layout.shapes().items()
        }
    if layout.master:
        state["master"].copy_(param)
    return state


def host_entries_(state: State) -> State:
    """Puts back on the CPU, in place, what belongs there: many recipes move all of a state.

    Args:
        state: of one parameter; empty if it has none yet.

    Returns:
        ``state``.
    """
    for key in HOST_KEYS:
        if key in state and not state[key].is_cpu:
            state[key] = state[key].to("cpu").contiguous()
    return state


def changed_options(before: Sequence[object], after: Sequence[object]) -> list[str]:
    """The names of those STRUCTURAL_OPTIONS whose values, in their order, differ."""
    values = zip(STRUCTURAL_OPTIONS, before, after, strict=False)
    return [option for option, old, new in values if old != new]


def check_state(
    name: str, state: Mapping[str, Any], layout: Layout, changed: Sequence[str] = ()
) -> None:
    """Checks the state of a parameter against its layout.

    Args:
        name: of the parameter.
        state: what is checked.
        layout: the parameter's.
        changed: options that have changed since the state was made, for the message.

    Raises:
        ValueError: naming the parameter, the tensor, what was expected and what came.
    """
    owner = f"state of {name}"
    if changed:
        owner += f", which cannot follow a change of {', '.join(changed)}"
    for key, (shape, dtype) in layout.shapes().items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise ValueError(f"{owner}: expected a tensor {key!r}, got {value!r}")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{owner}: {key!r}: expected {dtype} of shape {shape}, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    unknown = set(state) - set(layout.shapes())
    if unknown:
        raise ValueError(
            f"{owner}: expected the tensors {sorted(layout.shapes())}, got also {sorted(unknown)}"
        )


def bytes_by_kind(states: Iterable[State]) -> dict[str, int]:
    """The entries that :meth:`dykaf.DyKAF.state_bytes` documents."""
    sizes = dict.fromkeys([*KINDS.values(), "scalars"], 0)
    for state in states:
        for key, value in state.items():
            sizes[KINDS.get(key, "scalars")] += value.numel() * value.element_size()
    sizes["total"] = sum(sizes.values())
    return sizes


def matrices(state: State) -> Iterator[State]:
    """The state of each matrix of a stack, as views."""
    batch = tuple(state["step"].shape)
    flat = {key: value.reshape(-1, *value.shape[len(batch) :]) for key, value in state.items()}
    for idx in range(math.prod(batch)):
        yield {key: value[idx] for key, value in flat.items() if key != "master"}
