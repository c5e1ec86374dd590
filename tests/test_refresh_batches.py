"""Decompositions in batches: adapters whose gradients are hard to decompose, long first bases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import reference
import torch
from optim_helpers import two_sided
from tolerances import distance, gamma, orthogonality_bound
from torch import Tensor, nn

from dykaf import DyKAF, ops
from dykaf.options import step_options
from dykaf.state import Layout, new_state

pytestmark = pytest.mark.skipif(
    "__import__('backends').BACKEND not in ('cpu', 'aten')", reason="takes tensors on the CPU"
)

SHORT, LONG, RANK = 4, 90, 16


@pytest.fixture(autouse=True)
def aten() -> Iterator[None]:
    with ops.aten_alone():
        yield


def hard_gradients(kind: str, num: int) -> list[Tensor]:
    """Of few directions, so that the long side's factor is kept without a cut."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    space = randn(6, LONG)
    grads = []
    for _ in range(num):
        mix = randn(SHORT, 6)
        if kind == "rows nearly alike":
            mix = mix[:1] + 1e-6 * mix
        elif kind == "rows equal and zero":
            mix[1], mix[2], mix[3] = mix[0], -2 * mix[0], 0
        elif kind == "the same gradient":
            mix = torch.arange(24.0).double().view(SHORT, 6).cos()
        elif kind == "rows of many sizes":
            mix *= torch.logspace(0, -9, SHORT)[:, None]
        G = mix @ space
        if kind == "six columns":
            G[:, 6:] = 0
        grads.append(G)
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind",
    [
        "rows nearly alike",
        "rows equal and zero",
        "the same gradient",
        "rows of many sizes",
        "six columns",
    ],
)
def test_adapters_of_dependent_rows(kind: str, dtype: torch.dtype) -> None:
    """The average is the dense one, the basis orthonormal or zero, and exactly zero where there was
    no gradient. Beside it, in the same batch, a matrix that is easy."""
    params = [nn.Parameter(torch.zeros(SHORT, LONG, dtype=dtype)) for _ in range(2)]
    optimizer = two_sided(params, skinny_rank=RANK, eps=1e-6, precondition_frequency=1)
    easy = hard_gradients("easy", 12)
    R = None
    steps = hard_gradients(kind, 12)
    for grad, other in zip(steps, easy, strict=True):
        params[0].grad, params[1].grad = grad.to(dtype), other.to(dtype)
        optimizer.step()
        G = params[0].grad.double()
        new = 0.1 * G.T @ G / SHORT
        prior = 0.1 * G.square().mean() * torch.eye(LONG).double()
        R = new + prior if R is None else 0.9 * R + new
    assert R is not None
    state = optimizer.state[params[0]]
    assert int(state["refreshes"][1]) > 5 and not bool(state["refresh_fallbacks"])
    x = {key: value.double() for key, value in state.items()}
    used = x["basis"].T @ x["core"] @ x["basis"]
    found = (x["flat"] * torch.eye(LONG) + used) * x["rho"][1] ** 2
    # A decomposition passes for sound up to this (docs/algorithm.md).
    accepted = 1e-10 if dtype == torch.float64 else 0.0
    rounding = gamma(SHORT + LONG, dtype) + 2 * orthogonality_bound(LONG, dtype) + accepted
    assert distance(found, R) <= len(steps) * rounding * float(R.norm())
    V = x["basis"][: int(state["rows"][0])]
    is_there = V.abs().amax(1) > 0
    expected = torch.diag(is_there.double())
    assert int(is_there.sum()) <= 6
    assert distance(V @ V.T, expected) <= 4 * orthogonality_bound(LONG, dtype)
    if kind == "six columns":
        assert not V[:, 6:].any()
    assert not bool(optimizer.state[params[1]]["refresh_fallbacks"])


def test_a_long_first_basis_is_two_orthogonal_iterations() -> None:
    """Of a side over 1,024; weights without a gradient stay coordinates, to the last bit."""
    size, other = 1030, 1040
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(size, other, generator=generator, dtype=torch.float64)
    G[7] = 0
    param = nn.Parameter(torch.zeros(size, other, dtype=torch.float64))
    group = DyKAF([param]).param_groups[0]
    state = new_state(param, Layout.of(param, group))
    ops.initialize_([G], [state], [(0, 0)], step_options(group))
    assert state["refresh_fallbacks"] == 0

    F = G.square().mean() * torch.eye(size).double() + G @ G.T / other
    Q = torch.eye(size).double()
    for _ in range(2):
        order = torch.argsort(reference.rayleigh(F, Q), descending=True, stable=True)
        Q = reference.positive_qr(F @ Q[:, order])
    # The decompositions' errors grow by the factor's condition.
    eigenvalues = torch.linalg.eigvalsh(F)
    growth = float(eigenvalues[-1] / eigenvalues[0]) ** 2
    bound = 4 * orthogonality_bound(size, torch.float64) * growth
    assert distance(state["Q_L"], Q) <= bound
    found = Q @ state["L"] @ Q.T * float(state["rho"][0]) ** 2 / other**0.5
    assert distance(found, 0.1 * F) <= bound * float(F.norm())
    place = int(state["Q_L"][7].abs().argmax())
    unit = torch.eye(size).double()[7]
    assert torch.equal(state["Q_L"][7], torch.eye(size).double()[place])
    assert torch.equal(state["Q_L"][:, place], unit)


def test_first_gradients_of_many_are_those_of_each() -> None:
    shapes = [(8, 5), (8, 5), (4, 130), (4, 130), (8, 5)]
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    grads[4][2:] = 0  # fewer eigenvectors than the others
    together = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = two_sided(together)
    for param, grad in zip(together, grads, strict=True):
        param.grad = grad
    optimizer.step()
    for param, grad in zip(together, grads, strict=True):
        alone = nn.Parameter(torch.zeros_like(grad))
        alone.grad = grad
        single = two_sided([alone])
        single.step()
        for key, value in single.state[alone].items():
            if key != "next_refresh":
                assert torch.equal(optimizer.state[param][key], value), key
