"""torch.compile and a moving average beside DyKAF: the same model, to the compiler's rounding."""

from __future__ import annotations

import torch
from runs import assert_equal, weights
from tiny import blobs, classifier
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dykaf


def train(backend: str | None) -> tuple[nn.Module, nn.Module, list[dict[str, torch.Tensor]]]:
    model = classifier()
    optimizer = dykaf.DyKAF(dykaf.param_groups(model), lr=0.01)
    forward = model if backend is None else torch.compile(model, backend=backend)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    path = []
    points, label = blobs(64)
    for batch, target in zip(points.split(8), label.split(8), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(batch), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        path.append(weights(model))
    return model, average.module, path


def test_compiled_model_takes_the_same_steps() -> None:
    """ "aot_eager" compiles to the same operations, so that bits are equal."""
    model, average, _ = train("aot_eager")
    expected, expected_average, _ = train(None)
    assert_equal(weights(model), weights(expected))
    assert_equal(weights(average), weights(expected_average))


def test_groups_of_a_compiled_model() -> None:
    """Names get a prefix, groups stay."""
    model = classifier()
    compiled = torch.compile(model, backend="aot_eager")
    groups, of_compiled = dykaf.param_groups(model), dykaf.param_groups(compiled)
    for group, other in zip(groups, of_compiled, strict=True):
        params = [param for _, param in group["params"]]
        assert all(map(torch.Tensor.is_set_to, params, [param for _, param in other["params"]]))
        assert [f"_orig_mod.{name}" for name, _ in group["params"]] == [
            name for name, _ in other["params"]
        ]


def test_moving_average_follows_the_weights() -> None:
    """0.75 of the old one and 0.25 of the new, from the first step's weights on."""
    _, average, path = train(None)
    for name, found in weights(average).items():
        expected = path[0][name].double()
        for step in path[1:]:
            expected = 0.75 * expected + 0.25 * step[name].double()
        # Seven roundings to float32 of numbers of at most 1.5.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=14 * 2.0**-24)
