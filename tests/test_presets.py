"""The forms that have a name, against their textbook forms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import parameter, run
from torch import Tensor, nn

from dykaf import DyKAF, preset
from dykaf.presets import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence.orthogonal import OrthogonalOptimizer
from bench.textbook_soap import TextbookSOAP

LR, DECAY = 0.02, 0.1
SHAPES = [(6, 4), (4, 9), (5, 5)]


def gradients(shape: tuple[int, int], num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [mean + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num)]


def weights(make: Callable[[list[nn.Parameter]], Any], grads: list[Tensor]) -> Tensor:
    """What a weight comes to from zero."""
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = make([param])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def ours(name: str, grads: list[Tensor], **options: Any) -> Tensor:
    options = {"lr": LR, "weight_decay": DECAY, **preset(name), **options}
    return weights(lambda params: DyKAF(params, **options), grads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon(shape: tuple[int, int]) -> None:
    def textbook(params: list[nn.Parameter]) -> OrthogonalOptimizer:
        return OrthogonalOptimizer(params, lr=LR, weight_decay=DECAY, form="muon")

    grads = gradients(shape, 30)
    torch.testing.assert_close(ours("muon", grads), weights(textbook, grads))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_torch_muon() -> None:
    """It multiplies in bfloat16, 2^-9 in each of fifteen products, and the steps correct."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw", momentum=0.95
        )

    grads = gradients((6, 4), 30)
    found, expected = ours("muon", grads), weights(make, grads)
    assert float((found - expected).norm()) < 15 * 2.0**-9 * float(expected.norm())


@pytest.mark.parametrize("shape", [(5, 5), (8, 8)], ids=str)
def test_soap_until_its_first_refresh(shape: tuple[int, int]) -> None:
    """The prior moves eigenvalues alike, and no eigenvector; refreshes are where it tells. (Of a
    longer side one gradient leaves a null space, where SOAP's basis is as it happens to be.)"""

    def textbook(params: list[nn.Parameter]) -> TextbookSOAP:
        return TextbookSOAP(params, lr=LR, weight_decay=DECAY)

    grads = gradients(shape, 11)
    torch.testing.assert_close(ours("soap", grads), weights(textbook, grads))
    more = gradients(shape, 13)
    assert not torch.allclose(ours("soap", more), weights(textbook, more), rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw(shape: tuple[int, int]) -> None:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)

    grads = gradients(shape, 30)
    torch.testing.assert_close(ours("adamw", grads), weights(make, grads))


def test_adamuon_is_the_direction_of_adam_orthogonalised() -> None:
    """One step from zero moments: D = sign(G), whose polar factor five steps nearly reach."""
    G = torch.tensor([[3.0, -1.0], [2.0, 4.0]], dtype=torch.float64)
    found = ours("adamuon", [G], weight_decay=0.0, eps=0.0, orthogonalize=5)
    left, _, right = torch.linalg.svd(torch.sign(G))
    polar = left @ right
    # The quintic maps singular values near 1 to between 0.68 and 1.21, and equal ones alike.
    ratio = float(-found.flatten() @ polar.flatten() / polar.norm() ** 2) / (0.2 * 2**0.5 * LR)
    assert 0.68 < ratio < 1.21
    torch.testing.assert_close(found, -0.2 * 2**0.5 * LR * ratio * polar)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_all_take_steps_and_are_new_dictionaries(name: str) -> None:
    options = preset(name)
    optimizer = DyKAF([parameter(6, 4), parameter(4, 3, 2), parameter(5)], **options)
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    run(optimizer, range(4))
    for param, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert bool(param.isfinite().all()) and not torch.equal(param, old)
    options["lr"] = 5.0
    assert "lr" not in preset(name)


def test_the_default_is_a_preset() -> None:
    assert preset("dykaf") == {}


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError) as caught:
        preset("sgd")
    expected = "adamuon, adamw, dykaf, muon, paper, soap"
    assert str(caught.value) == f"name: expected one of {expected}, got 'sgd'"
