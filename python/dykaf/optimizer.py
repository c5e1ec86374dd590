"""The DyKAF optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dykaf.engine import KroneckerOptimizer
from dykaf.options import DYKAF_RULES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DyKAF(KroneckerOptimizer):
    r"""Adam in the eigenbasis of a Kronecker-factored Fisher matrix that an integrator tracks.

    For a weight W (m x n) with gradient G, one step is, t counted after the first gradient:

    .. code-block:: text

        G~         = Q_L^T G Q_R
        exp_avg    = beta1 exp_avg + (1 - beta1) G~
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) G~^2
        N          = beta1 exp_avg / (1 - beta1^t) + (1 - beta1) G~
        D          = N / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        W          = W (1 - lr weight_decay) - lr Q_L orthogonalised(D) Q_R^T
        L, R, rho  = one integrator step towards factor_beta rho^2 L (x) R
                     + (1 - factor_beta) vec(G) vec(G)^T
        Q_L, Q_R   = one power iteration of L, R, when a refresh is due; exp_avg_sq is scaled by
                     what the diagonals of L and R have grown by

    By default a matrix keeps the factor and the basis of its shorter side alone; the other basis is
    the identity. The first gradient of a matrix that is not zero sets the factors and bases and
    updates nothing. Vectors, scalars and matrices with both sides over ``max_precond_dim`` are
    updated by AdamW.
    Tensors of more than two dimensions are stacks of matrices where ``batch_dims`` says so, and
    otherwise matrices, first dimension by the rest.

    Updates are bounded whatever the gradients: orthogonalised, their root mean square by 0.24 lr;
    without, by lr times Adam's own bound, 1 for equal betas (docs/algorithm.md).

    The defaults are what trains best (docs/evidence.md); :func:`dykaf.preset` has the paper's own
    form, SOAP's, Muon's and others.

    Every option is an entry of the parameter group and is read at each step.

    Args:
        params: parameters, named parameters, or groups of either; of dtype float64, float32,
            bfloat16 or float16, on any device. :func:`dykaf.param_groups` makes sensible groups.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of exp_avg and of the second moment, two numbers.
        eps: added to the root of the second moment after bias correction.
        weight_decay: decoupled weight decay.
        factor_beta: decay of the factors; None: ``betas[1]``, as in the paper.
        precondition_frequency: steps between refreshes of a basis.
        max_precond_dim: a side longer than this gets no factor; 0 sends all matrices to AdamW.
        sides: which factors a matrix keeps: "one" (of the shorter side; of a square matrix the
            left), "both", or "none" (there is no basis then).
        skinny_rank: of a matrix with a side at least 16 times the other (LoRA's adapters), the rank
            at which the factor of the long side is kept, the rest of it as a multiple of the
            identity; 0: in full. It applies where the short side is at most, the long side at least
            twice ``skinny_rank``, to the default integrator; the second moment of such a matrix is
            small whatever ``second_moment`` is.
        integrator: "diagonal" (the averages of G G^T and G^T G, as in Shampoo and SOAP; two
            products, not four), "ksl" (Lubich & Oseledets) or "bug" (Ceruti & Lubich, the paper's).
        init: "identity", or "rank_one" from the top singular pair of the first gradient.
        second_moment: "full" [m, n], "rank_one" or "factored" (m + n numbers each), or "none" (the
            update is the momentum; with ``sides="none"`` and ``orthogonalize`` alone).
        nesterov: momentum of matrices as Nesterov's, beta1 exp_avg + (1 - beta1) G~.
        orthogonalize: Newton-Schulz steps on the update of a matrix; 0: none.
        refresh_schedule: "geometric": often at the start, then every precondition_frequency steps,
            the sides of the matrices spread over these; "fixed": all of them at every
            precondition_frequency-th step.
        rescale_exp_avg_sq: at a refresh, scale the second moment by the change of the factors'
            diagonals.
        matmul_precision: "highest", "high" or "medium" for float32 products, as
            torch.set_float32_matmul_precision; None follows torch's setting.
        batch_dims: leading dimensions that index separate matrices (experts, stacked layers), of
            tensors that have them beside two; None: all but the last two, where none of them is
            longer than either of these.
        state_dtype: of factors and bases: "float32" (float64 for float64 parameters) or "bfloat16",
            half the memory of these; a step then computes with copies in full, at most 512 MiB of
            them, or one parameter's, at a time.
        low_precision: how bfloat16 and float16 parameters are updated: "stochastic" rounding or a
            float32 "master" copy in the state.
        seed: of the stochastic rounding.
        maximize: ascend instead of descend.
        nonfinite: what a NaN or infinite gradient does: "skip" the whole step and count it in
            ``skipped_steps``, "raise" before anything has changed, or "propagate".
        process_group: over which the work on parameters that are equal on all ranks, as with
            DistributedDataParallel, and their state are shared; None: every rank does all. DTensors
            (fully_shard, parallelize_module) need no argument (docs/distributed.md).

    Attributes:
        amp_scaling: False: as with torch.optim.AdamW, GradScaler unscales the gradients, waits for
            the GPU to know whether they are finite, and calls no step where they are not. True, as
            with torch.optim.AdamW(fused=True): its scale and its verdict are taken inside the step,
            without a wait, and count in ``skipped_steps``; gradients are still scaled before the
            step, so call ``scaler.unscale_(optimizer)`` before they are clipped or read.

    Raises:
        ValueError: for an option or parameter that is not as described, naming it.

    Source: Yudin et al., arXiv 2511.06477; docs/algorithm.md lists the deliberate deviations.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = 0.9,
        precondition_frequency: int = 50,
        max_precond_dim: int = 10000,
        sides: str = "one",
        skinny_rank: int = 32,
        integrator: str = "diagonal",
        init: str = "identity",
        second_moment: str = "full",
        nesterov: bool = True,
        orthogonalize: int = 3,
        refresh_schedule: str = "geometric",
        rescale_exp_avg_sq: bool = True,
        matmul_precision: str | None = None,
        batch_dims: int | None = None,
        state_dtype: str = "float32",
        low_precision: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        nonfinite: str = "skip",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name in DYKAF_RULES}
        super().__init__(params, defaults, process_group)
