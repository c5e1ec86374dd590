"""How well Kronecker factors follow a Fisher matrix that is small enough to write down.

One stream of gradients G_t (m x n), scaled by a constant, from a model that AdamW trains. Targets:

    in-sample   F_t = beta F_(t-1) + (1 - beta) vec(G_t) vec(G_t)^T, F_0 = 0
    next-step   the mean of vec(G) vec(G)^T over fresh batches at the weights after step t

Every method gives L (x) R. Its error is ||F - L (x) R|| over that of the best Kronecker product,
which the largest singular value of Van Loan's rearrangement gives: "own" as the method scales it,
where it has a scale (none of them corrects for the short average of the first steps, nor does F_t),
"scaled" after the best multiple c L (x) R. `off_diagonal` is the share of ||F||^2 that stands
off the diagonal in the eigenbasis of L (x) R; 0 would be a basis that Adam can use without loss.
The dykaf rows are the factors of the optimizer itself, run with learning rate 0.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dykaf
from bench.evidence.grid import Run
from bench.evidence.kronecker import first_state, update_factors
from bench.evidence.optimizers import DYKAF_BASE
from bench.evidence.tasks import byte_lm, digits

DYKAF_METHODS: dict[str, dict[str, Any]] = {
    "ksl": {"integrator": "ksl"},
    "bug": {"integrator": "bug"},
    "ksl, rank-one start": {"integrator": "ksl", "init": "rank_one"},
    "bug, rank-one start": {"integrator": "bug", "init": "rank_one"},
    "diagonal": {"integrator": "diagonal"},
}
BATCH = {"digits": 32, "gpt_slice": 8}
SLICE = (24, 32)  # of the first block's attention output weight: its Fisher matrix is 768 x 768
SLICE_SETTINGS = {"dim": 128, "num_layers": 2, "num_heads": 4, "context": 64}
LR = 3e-3
Factors = tuple[Tensor, Tensor]


def data_sha256(task: str, settings: dict[str, Any]) -> str:
    parts = digits.data_sha256(task, settings) + byte_lm.load("shakespeare")[2]
    return hashlib.sha256(parts.encode()).hexdigest()


# ---- Gradients -----------------------------------------------------------------------------------


class Problem:
    """A model in training: `advance` takes a step, `gradient` looks at a fresh batch."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = BATCH[name]
        if name == "digits":
            self.X, self.y, _ = digits.load()
            self.model: torch.nn.Module = digits.Softmax(seed, self.X.shape[1])
            self.weight = self.model.weight
            self.block = (slice(None), slice(None))
            self.loss: Callable[[], Tensor] = self.digits_loss
        else:
            self.text = byte_lm.load("shakespeare")[0]
            self.model = byte_lm.GPT(**SLICE_SETTINGS)
            self.weight = self.model.blocks[0].attention.out.weight
            self.block = (slice(SLICE[0]), slice(SLICE[1]))
            self.loss = self.text_loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def digits_loss(self) -> Tensor:
        rows = torch.randint(len(self.y), (self.batch,), generator=self.generator)
        return functional.cross_entropy(self.X[rows] @ self.weight.T, self.y[rows])

    def text_loss(self) -> Tensor:
        context = SLICE_SETTINGS["context"]
        return self.model.loss(byte_lm.sample_batch(self.text, self.batch, context, self.generator))

    def advance(self) -> Tensor:
        """The gradient of a batch, after a training step with it."""
        self.optimizer.zero_grad()
        self.loss().backward()
        G = self.weight.grad[self.block].double().clone()
        self.optimizer.step()
        return G

    def gradients(self, count: int) -> Iterator[Tensor]:
        """Gradients of fresh batches at the present weights."""
        for _ in range(count):
            (G,) = torch.autograd.grad(self.loss(), self.weight)
            yield G[self.block].double()


# ---- Methods -------------------------------------------------------------------------------------


class DykafFactors:
    """The factors inside dykaf.DyKAF, turned back to the original coordinates."""

    def __init__(self, shape: torch.Size, beta: float, options: dict[str, Any]) -> None:
        self.weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        options = {**DYKAF_BASE, **options, "lr": 0.0, "factor_beta": beta}
        self.optimizer = dykaf.DyKAF([self.weight], **options)
        # "diagonal" keeps two averages, each with a scale of its own; their product has none.
        self.has_scale = options["integrator"] != "diagonal"

    def update(self, G: Tensor) -> None:
        self.weight.grad = G.clone()
        self.optimizer.step()

    def factors(self) -> Factors:
        state = self.optimizer.state[self.weight]
        L, R = (state[f"Q_{side}"] @ state[side] @ state[f"Q_{side}"].T for side in "LR")
        return float(state["rho"][0]) ** 2 * L, R


class AveragedFactors:
    """Factors of SOAP/Shampoo or of KL-Shampoo."""

    has_scale = True

    def __init__(self, beta: float, kind: str) -> None:
        self.beta, self.kind = beta, kind
        self.state: dict[str, Any] = {}

    def update(self, G: Tensor) -> None:
        if not self.state:
            self.state = first_state(G, self.beta, self.kind)
            return
        update_factors(self.state, G, self.beta, self.kind)
        self.state["Q"] = [torch.linalg.eigh(S).eigenvectors for S in self.state["S"]]

    def factors(self) -> Factors:
        L, R = self.state["S"]
        # Shampoo's L and R both have the trace of F, so their product has it once too often.
        return (L / L.trace(), R) if self.kind == "shampoo" else (L, R)


# ---- Measures ------------------------------------------------------------------------------------


def van_loan(F: Tensor, m: int, n: int) -> Tensor:
    """[(i, k), (j, l)] of the m^2 x n^2 rearrangement is F[(i, j), (k, l)]."""
    return F.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def best_error(F: Tensor, m: int, n: int) -> float:
    """||F - L (x) R|| for the best L (x) R: all singular values but the first.

    They come from the Gram matrix of the shorter side, in float64: relative errors are far above
    its rounding of 1e-8.
    """
    A = van_loan(F, m, n)
    gram = A @ A.T if m <= n else A.T @ A
    largest = torch.linalg.eigvalsh(gram)[-1]
    return math.sqrt(max(float(A.square().sum() - largest), 0.0))


def measures(F: Tensor, best: float, L: Tensor, R: Tensor) -> dict[str, float | None]:
    """Errors relative to the best, and the off-diagonal share."""
    m, n = L.shape[0], R.shape[0]
    K = torch.kron(L, R)
    total, inner, size = (float((x * y).sum()) for x, y in ((F, F), (F, K), (K, K)))
    own = math.sqrt(max(total - 2 * inner + size, 0.0))
    scaled = math.sqrt(max(total - inner**2 / size, 0.0)) if size > 0 else math.sqrt(total)
    Q_L, Q_R = (torch.linalg.eigh(S).eigenvectors for S in (L, R))
    # diag((Q_L (x) Q_R)^T F (Q_L (x) Q_R)) without the full product.
    half = torch.einsum("ijkl,ia,ka->ajl", F.reshape(m, n, m, n), Q_L, Q_L)
    diagonal = torch.einsum("ajl,jb,lb->ab", half, Q_R, Q_R)
    return {
        "own": own / best,
        "scaled": scaled / best,
        "off_diagonal": 1 - float(diagonal.square().sum()) / total,
    }


def is_measured(step: int, settings: dict[str, Any]) -> bool:
    """Every step while the first crossing matters, then now and then."""
    return step <= settings["dense_until"] or step % settings["every"] == 0


def execute(run: Run) -> dict[str, Any]:
    """Follow one stream with all methods.

    Returns:
        points: one per measured step, method and target, with the three measures.
    """
    settings, beta, scale = run.settings, run.options["beta"], run.options["scale"]
    start = time.process_time()
    problem = Problem(run.contender, run.seed)
    shape = problem.weight[problem.block].shape
    m, n = shape
    methods: dict[str, DykafFactors | AveragedFactors] = {
        name: DykafFactors(shape, beta, options) for name, options in DYKAF_METHODS.items()
    }
    methods["Shampoo, SOAP"] = AveragedFactors(beta, "shampoo")
    methods["KL-Shampoo"] = AveragedFactors(beta, "kl")
    average = torch.zeros(m * n, m * n, dtype=torch.float64)
    points = []
    for step in range(1, settings["steps"] + 1):
        G = scale * problem.advance()
        average = beta * average + (1 - beta) * torch.outer(G.flatten(), G.flatten())
        for method in methods.values():
            method.update(G)
        if not is_measured(step, settings):
            continue
        targets = {"in-sample": average}
        if step % settings["every"] == 0:
            fresh = [scale * g.flatten() for g in problem.gradients(settings["fresh_batches"])]
            rows = torch.stack(fresh)
            targets["next-step"] = rows.T @ rows / len(fresh)
        for target, F in targets.items():
            best = best_error(F, m, n)
            for name, method in methods.items():
                values = measures(F, best, *method.factors())
                if not method.has_scale or target == "next-step":
                    values["own"] = None
                points.append({"step": step, "method": name, "target": target, **values})
    return {
        "points": points,
        "final": None,
        "diverged": False,
        "cpu_seconds": time.process_time() - start,
    }
