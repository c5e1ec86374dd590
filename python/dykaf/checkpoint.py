"""Saved state: checked before anything changes, then taken over as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dykaf.checks import param_name
from dykaf.distributed.alone import Alone
from dykaf.options import check_alike, check_options, plain_options, rules_of
from dykaf.state import HOST_KEYS, SCALE_KEYS, Layout, State, check_state

# What options were that groups of older checkpoints lack. (Those of another optimizer have none.)
_FORMERLY = {"sides": "both", "nesterov": False, "orthogonalize": 0}


def checked_state_dict(
    state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``state_dict`` after all checks, with the options that it lacks taken from the groups.

    The count of skipped steps is an entry of the whole in what this returns and in old checkpoints,
    of every group in new ones.

    Args:
        state_dict: of an optimizer with equally many groups and parameters; another is returned
            as it is, for torch has its own message then.
        param_groups: of the optimizer that loads it.

    Raises:
        ValueError: naming the option, or the parameter and tensor, that does not fit.
    """
    groups = state_dict["param_groups"]
    lengths = [len(group["params"]) for group in param_groups]
    if [len(group["params"]) for group in groups] != lengths:
        return state_dict
    states, filled = dict(state_dict["state"]), []
    for group_idx, (saved, group) in enumerate(zip(groups, param_groups, strict=True)):
        options = dict(saved)
        if options.pop("metric_power", 0) != 0:  # an option once, and not of the skinny form
            options["skinny_rank"] = 0
        options.pop("refresh_stagger", None)  # an option once: the schedule decides
        former = _FORMERLY if "integrator" in saved else {}
        if "integrator" in saved:  # else they are another optimizer's, of AdamW's state
            check_alike(group, saved)
        for name in rules_of(group):
            options.setdefault(name, former.get(name, group[name]))
        check_options(options)
        options.update(plain_options(options))
        for idx, (param, saved_idx) in enumerate(
            zip(group["params"], saved["params"], strict=True)
        ):
            state = states.get(saved_idx)
            if state:
                name = param_name(group, group_idx, idx)
                if is_lazy(param):
                    raise ValueError(
                        f"state of {name}: expected a parameter that has its shape, "
                        f"got {type(param).__name__}"
                    )
                layout = Layout.of(param, options)
                if not layout.is_matrix:
                    states[saved_idx] = state = _from_adamw(name, state, layout)
                states[saved_idx] = state = _with_scales_of(layout, state)
                check_state(name, state, layout)
        filled.append(options)
    counts = [group.get("skipped_steps", 0) for group in groups]
    skipped_steps = {"skipped_steps": max(counts, default=0)}
    return {**skipped_steps, **state_dict, "state": states, "param_groups": filled}


def _with_scales_of(layout: Layout, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with what is float64 on most devices in the dtype that the parameter's has."""
    found = dict(state)
    for key in SCALE_KEYS:
        value = found.get(key)
        if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64):
            found[key] = value.to(layout.scale_dtype)
    return found


def _from_adamw(name: str, state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The state of a parameter without factors, which may be one of torch.optim.AdamW.

    That has a ``step`` of any type, moments of the parameter's dtype and no ``update_rms``.
    """
    if "max_exp_avg_sq" in state:
        raise ValueError(
            f"state of {name}: expected one of AdamW without amsgrad, got 'max_exp_avg_sq'"
        )
    found = dict(state)
    found.setdefault("update_rms", torch.zeros((), device="cpu"))
    if isinstance(found.get("step"), Real):
        found["step"] = torch.tensor(float(found["step"]), dtype=torch.float32, device="cpu")
    for key, (_, dtype) in layout.shapes().items():
        value = found.get(key)
        if isinstance(value, Tensor) and (value.is_floating_point() or key == "step"):
            found[key] = value.to(dtype)
    return found


def exact_states(
    saved: Mapping[Tensor, Mapping[str, Tensor]], sharing: Alone
) -> dict[Tensor, State]:
    """Copies of saved states, without a cast, by parameter.

    Args:
        saved: checked.
        sharing: of the optimizer that loads them; of a sharded parameter a state is what this rank
            keeps.
    """
    sharded = sharing.at_work(
        {param: state for param, state in saved.items() if sharing.of(param) is not None}
    )
    return {
        param: sharded[param] if param in sharded else _copied(param, state)
        for param, state in saved.items()
    }


def _copied(param: Tensor, state: Mapping[str, Tensor]) -> State:
    return {
        name: value.detach()
        .to("cpu" if name in HOST_KEYS else param.device)
        .clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
