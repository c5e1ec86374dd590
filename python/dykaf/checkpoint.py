"""Saved state: checked before anything changes, then taken over as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dykaf.checks import param_name
from dykaf.options import RULES, check_options, plain_options
from dykaf.state import HOST_KEYS, Layout, State, check_state


def checked_state_dict(
    state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``state_dict`` after all checks, with the options that it lacks taken from the groups.

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
    filled = []
    for group_idx, (saved, group) in enumerate(zip(groups, param_groups, strict=True)):
        options = dict(saved)
        for name in RULES:
            options.setdefault(name, group[name])
        check_options(options)
        options.update(plain_options(options))
        for idx, (param, saved_idx) in enumerate(
            zip(group["params"], saved["params"], strict=True)
        ):
            state = state_dict["state"].get(saved_idx)
            if state:
                name = param_name(group, group_idx, idx)
                if is_lazy(param):
                    raise ValueError(
                        f"state of {name}: expected a parameter that has its shape, "
                        f"got {type(param).__name__}"
                    )
                check_state(name, state, Layout.of(param, options))
        filled.append(options)
    return {**state_dict, "param_groups": filled}


def exact_states(
    state_dict: Mapping[str, Any], param_groups: Sequence[dict[str, Any]]
) -> dict[Tensor, State]:
    """Copies of the saved states, without a cast, by parameter.

    Args:
        state_dict: checked.
        param_groups: of the optimizer that loads it.
    """
    ids = [idx for group in state_dict["param_groups"] for idx in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    return {
        param: {
            name: value.detach()
            .to("cpu" if name in HOST_KEYS else param.device)
            .clone(memory_format=torch.contiguous_format)
            for name, value in state_dict["state"][idx].items()
        }
        for param, idx in zip(params, ids, strict=True)
        if state_dict["state"].get(idx)
    }
