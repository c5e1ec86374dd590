"""The FISMO optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dykaf.engine import KroneckerOptimizer
from dykaf.options import FISMO_FIXED, FISMO_RULES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FISMO(KroneckerOptimizer):
    r"""Momentum whitened by a Kronecker-factored Fisher matrix, orthogonalised, brought back.

    For a weight W (m x n) with gradient G, and the factors P and Q with traces m and n, one step
    is, t counted after the first gradient:

    .. code-block:: text

        P       = m S / tr(S), S the average of G Q^-1 G^T / n + damping tr(S) / m I
        Q       = n S / tr(S), S the average of G^T P^-1 G / m + damping tr(S) / n I
        Gw      = P^-1/2 G Q^-1/2
        exp_avg = beta1 exp_avg + (1 - beta1) Gw
        N       = beta1 exp_avg / (1 - beta1^t) + (1 - beta1) Gw
        W       = W (1 - lr weight_decay) - lr P^-1/2 orthogonalised(N) Q^-1/2

    The averages have the decay ``factor_beta``. The update has the norm that orthogonalised(N) has:
    a root mean square of 0.2, so that rates are of AdamW's size. The powers of P and Q come from
    their diagonals in tracked bases, which are refreshed as in :class:`dykaf.DyKAF`. The first
    gradient of a matrix that is not zero sets the factors and bases and updates nothing. Vectors,
    scalars and matrices with both sides over ``max_precond_dim`` are updated by AdamW.

    Updates hang on no scale of the gradients, and their root mean square is at most 0.24 lr.
    docs/fismo.md tells what is the paper's, what is not, and when to take it.

    Options, groups, state, checkpoints and sharding are as in :class:`dykaf.DyKAF`, and so are
    those arguments that are not described here.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of exp_avg, and AdamW's second one; two numbers.
        eps: AdamW's.
        weight_decay: decoupled weight decay.
        factor_beta: decay of the factors' averages; None: ``betas[1]``.
        damping: added to the factors' averages, as a share of their mean eigenvalue.
        exponent: of the inverse factors around the momentum.
        integrator: "coupled" (as above), or "diagonal": the averages of G G^T and G^T G.
        momentum: "whitened" (as above), or "plain": exp_avg is the average of G, whitened in each
            step.
        graft: whether the update gets the norm that it has when it is orthogonalised.
        roots: "tracked" (as above), or "exact": from an eigendecomposition of each factor in each
            step, which takes long.
        nesterov: False: N is exp_avg.
        orthogonalize: Newton-Schulz steps.
        precondition_frequency: steps between refreshes of a basis.
        max_precond_dim: a side longer than this gets no factor; 0 sends all matrices to AdamW.
        sides: "both", or "one" (of the shorter side alone; of a square matrix the left).
        refresh_schedule: as in DyKAF, as all that follow.
        matmul_precision: "highest", "high", "medium", or None for torch's setting.
        batch_dims: leading dimensions that index separate matrices.
        state_dtype: of factors and bases, "float32" or "bfloat16".
        low_precision: "stochastic" rounding of bfloat16 and float16 parameters, or a "master" copy.
        seed: of the stochastic rounding.
        maximize: ascend instead of descend.
        nonfinite: "skip", "raise" or "propagate".
        process_group: over which the work on parameters that are equal on all ranks is shared.

    Raises:
        ValueError: for an option or parameter that is not as described, naming it.

    Source: Xu, Yan & Zhang, arXiv 2601.21750; for "diagonal", "plain", other exponents and the
    norm: Mousse, Zhang et al., arXiv 2603.09697.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = 0.95,
        damping: float = 0.1,
        exponent: float = 0.5,
        integrator: str = "coupled",
        momentum: str = "whitened",
        graft: bool = True,
        roots: str = "tracked",
        nesterov: bool = True,
        orthogonalize: int = 3,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        sides: str = "both",
        refresh_schedule: str = "geometric",
        matmul_precision: str | None = None,
        batch_dims: int | None = None,
        state_dtype: str = "float32",
        low_precision: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        nonfinite: str = "skip",
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in FISMO_RULES}
        super().__init__(params, {**options, **FISMO_FIXED}, process_group)
