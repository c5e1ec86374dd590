"""The optimizers that the evidence suite brings along, against their formulas in other words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence.kronecker import KroneckerOptimizer
from bench.evidence.orthogonal import OrthogonalOptimizer


def eigenbasis(S: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(S).eigenvectors.flip(1)


def spectral_power(S: torch.Tensor, Q: torch.Tensor, exponent: float) -> torch.Tensor:
    return Q @ torch.diag(torch.diag(Q.T @ S @ Q) ** exponent) @ Q.T


@pytest.mark.parametrize(
    ("factors", "update"), [("shampoo", "adam"), ("kl", "adam"), ("kl", "root")]
)
def test_kronecker_steps(factors: str, update: str) -> None:
    """Three gradients, a refresh after each; the bases are compared through what they do."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    beta1, beta2, lr, eps, decay = 0.9, 0.8, 0.1, 1e-3, 0.5
    W = torch.nn.Parameter(start.clone())
    optimizer = KroneckerOptimizer(
        [W],
        lr,
        (beta1, beta2),
        eps,
        decay,
        precondition_frequency=1,
        factors=factors,
        update=update,
    )
    for G in (torch.zeros_like(start), *gradients):  # a zero gradient sets up nothing
        W.grad = G.clone()
        optimizer.step()

    def averaged(S: list[torch.Tensor], Q: list[torch.Tensor], G: torch.Tensor) -> list:
        left, right = torch.eye(3).double(), torch.eye(4).double()
        if factors == "kl":
            left, right = spectral_power(S[1], Q[1], -1) / 3, spectral_power(S[0], Q[0], -1) / 4
        terms = G @ left @ G.T, G.T @ right @ G
        return [beta2 * s + (1 - beta2) * term for s, term in zip(S, terms, strict=True)]

    first = gradients[0]
    unit = [torch.eye(4).double(), torch.eye(3).double()]
    scale = first.square().mean().sqrt() if factors == "kl" else 0.0
    S = averaged([scale * eye for eye in unit], unit, first)
    Q = [eigenbasis(s) for s in S]
    expected, M, V = start, torch.zeros_like(start), torch.zeros_like(start)
    for t, G in enumerate(gradients[1:], 1):
        M = beta1 * M + (1 - beta1) * G
        V = beta2 * V + (1 - beta2) * (Q[0].T @ G @ Q[1]) ** 2
        mean = M / (1 - beta1**t)
        new = averaged(S, Q, G)
        if update == "adam":
            root = (V / (1 - beta2**t)).sqrt() + eps
            step = Q[0] @ ((Q[0].T @ mean @ Q[1]) / root) @ Q[1].T
        else:
            step = spectral_power(new[0], Q[0], -0.5) @ mean @ spectral_power(new[1], Q[1], -0.5)
        expected = expected * (1 - lr * decay) - lr * step
        S = new
        for side in range(2):
            order = torch.diag(Q[side].T @ S[side] @ Q[side]).argsort(descending=True)
            Q[side] = torch.linalg.qr(S[side] @ Q[side][:, order]).Q
            V = V.index_select(side, order)
    assert torch.allclose(W.detach(), expected, rtol=1e-10, atol=1e-12)


def test_soap_without_the_factor_of_a_long_side() -> None:
    """As SOAP of the matrix times any rotation of that side would be of the unrotated one."""
    generator = torch.Generator().manual_seed(2)
    W = torch.nn.Parameter(torch.randn(3, 6, generator=generator, dtype=torch.float64))
    beta1, beta2, lr = 0.9, 0.8, 0.1
    options = {"eps": 1e-3, "weight_decay": 0.0, "precondition_frequency": 1}
    optimizer = KroneckerOptimizer([W], lr, (beta1, beta2), max_precond_dim=5, **options)
    gradients = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    expected, M, V = W.detach().clone(), torch.zeros(3, 6).double(), torch.zeros(3, 6).double()
    S = (1 - beta2) * gradients[0] @ gradients[0].T
    Q = eigenbasis(S)
    for t, G in enumerate(gradients):
        W.grad = G.clone()
        optimizer.step()
        if t == 0:
            continue
        M = beta1 * M + (1 - beta1) * G
        V = beta2 * V + (1 - beta2) * (Q.T @ G) ** 2
        mean, square = M / (1 - beta1**t), V / (1 - beta2**t)
        expected = expected - lr * Q @ ((Q.T @ mean) / (square.sqrt() + 1e-3))
        S = beta2 * S + (1 - beta2) * G @ G.T
        order = torch.diag(Q.T @ S @ Q).argsort(descending=True)
        Q, V = torch.linalg.qr(S @ Q[:, order]).Q, V[order]
    assert torch.allclose(W.detach(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="max_precond_dim: for SOAP alone, got 5"):
        KroneckerOptimizer([W], factors="kl", max_precond_dim=5)


def polar_share(X: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz by singular values."""
    left, s, right = torch.linalg.svd(X / X.norm(), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (left * s) @ right


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["muon", "adam", "normuon"])
def test_orthogonal_steps(form: str, nesterov: bool, shape: tuple[int, int]) -> None:
    """Three gradients; averages as sums of their terms."""
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    beta1, beta2, lr, eps, decay, steps = 0.9, 0.8, 0.1, 1e-3, 0.5, 3
    W = torch.nn.Parameter(start.clone())
    optimizer = OrthogonalOptimizer(
        [W], lr, (beta1, beta2), eps, decay, form=form, steps=steps, nesterov=nesterov
    )
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()

    def mean(terms: list[torch.Tensor], beta: float) -> torch.Tensor:
        weights = [beta ** (len(terms) - 1 - i) for i in range(len(terms))]
        return sum(w * x for w, x in zip(weights, terms, strict=True)) / sum(weights)

    expected, squares = start, []
    for t in range(3):
        seen = list(gradients[: t + 1])
        N = mean(seen, beta1)
        if nesterov:
            N = beta1 * N + (1 - beta1) * seen[-1]
        if form == "adam":
            root = mean([G.square() for G in seen], beta2).sqrt()
            update = 0.2 * max(shape) ** 0.5 * polar_share(N / (root + eps), steps)
        else:
            update = 0.2 * max(shape) ** 0.5 * polar_share(N, steps)
        if form == "normuon":
            rows = polar_share(N, steps)
            squares.append(rows.square().mean(1, keepdim=True))
            rows = rows / (mean(squares, beta2).sqrt() + eps)
            update = 0.2 * rows / rows.square().mean().sqrt()
        expected = expected * (1 - lr * decay) - lr * update
    assert torch.allclose(W.detach(), expected, rtol=0, atol=1e-12)


def test_orthogonal_updates_of_nothing() -> None:
    for form in ("muon", "adam", "normuon"):
        W = torch.nn.Parameter(torch.ones(3, 2))
        W.grad = torch.zeros(3, 2)
        OrthogonalOptimizer([W], weight_decay=0.0, form=form).step()
        assert torch.equal(W.detach(), torch.ones(3, 2))
