"""What the tests of the tools have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"not the same: {different}"


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def groups_of(optimizer: torch.optim.Optimizer, *keys: str) -> list[dict[str, Any]]:
    """The names in each group, and the entries ``keys``."""
    return [
        {"names": group["param_names"], **{key: group[key] for key in keys}}
        for group in optimizer.param_groups
    ]
