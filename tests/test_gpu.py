"""The optimizer on a device: `--backend aten`, `--backend simt` or `--backend cuda`."""

from __future__ import annotations

import copy
from typing import Any

import backends
import pytest
import reference
import torch
from optim_helpers import bits, gradient, params_of, randn, run, two_sided
from reference import two_sided_reference
from tolerances import TRAJECTORY, gamma, newton_schulz_growth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dykaf import DyKAF
from dykaf.state import HOST_KEYS

pytestmark = pytest.mark.skipif(
    "not __import__('backends').is_gpu()", reason="not with --backend cpu"
)
on_hardware = pytest.mark.skipif(
    "not __import__('backends').on_hardware()", reason="only with --backend cuda or aten-cuda"
)

SHAPES = [(12, 8), (8, 33), (40,), (5, 7), (), (2, 130)]  # the last one is skinny


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    device = backends.device()
    return [randn(*shape, seed=i, dtype=dtype).to(device) for i, shape in enumerate(SHAPES)]


def everything(optimizer: DyKAF) -> list[Any]:
    """Parameters and state, but for what tells when to refresh."""
    return [
        (
            bits(param),
            {k: bits(v) for k, v in optimizer.state[param].items() if k not in HOST_KEYS},
        )
        for param in params_of(optimizer)
    ]


# ---- Values --------------------------------------------------------------------------------------


def separated_gradients(shape: tuple[int, int], num: int) -> list[Tensor]:
    """Whose factors have eigenvalues that lie apart, so that refreshes amplify little."""
    m, n = shape
    left = torch.linalg.qr(randn(m, m, seed=8)).Q * 1.5 ** -torch.arange(m)
    right = torch.linalg.qr(randn(n, n, seed=9)).Q * 1.5 ** -torch.arange(n)
    return list(left @ (randn(num, m, n, seed=7) + 0.5) @ right.T)


def amplification(factor: Tensor) -> float:
    """By how much a relative error of a factor turns its eigenvectors: its norm over a gap."""
    eigenvalues = torch.linalg.eigvalsh(factor)
    return float(eigenvalues[-1] / eigenvalues.diff().min())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"integrator": "ksl", "rescale_exp_avg_sq": False},
        {"integrator": "bug"},
        {"second_moment": "rank_one"},
        {"second_moment": "factored", "integrator": "ksl"},
        {"max_precond_dim": 6},
        {"matmul_precision": "highest", "precondition_frequency": 1},
        {"nesterov": True},
        {"orthogonalize": 3, "nesterov": True},
        {"orthogonalize": 5, "second_moment": "factored"},
        {"orthogonalize": 2, "max_precond_dim": 6, "integrator": "ksl"},
        {"sides": "one", "orthogonalize": 3, "nesterov": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()) or "default",
)
@pytest.mark.parametrize("shape", [(5, 7), (7, 4), (6, 6)])
def test_trajectory(
    shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 steps with refreshes, against the float64 reference in original coordinates.

    A step rounds G~, the update and the factors by sums of the sides' lengths, gamma of each. The
    factors' errors turn the bases, and D with them, by the amplification of the last factors
    (where those of the first steps are closer, they are the prior's and no gradient has been
    there); eps is large enough that no entry of D is its own rounding. So every step errs by that
    share of its length, and rounds W.

    With Newton-Schulz steps the update is 0.2 sqrt(max(m, n)) times an X that starts as D over two
    norms, with three times D's relative error, and fades by a third one. That grows: at most by
    3.4445 in a step where singular values are small, and in all by what newton_schulz_growth says
    of the reference's D. Their own rounding is less, a step of theirs being products of X,
    ||X|| <= 1.21, as D is one of H.
    """
    steps = 30
    W = randn(*shape, seed=3)
    param = W.float().to(backends.device())
    grads = separated_gradients(shape, steps)
    options = {"precondition_frequency": 5, "eps": 1e-2, **options}
    optimizer = two_sided([param], **options)
    options.pop("matmul_precision", None)
    updates: list[Tensor] = []  # the reference's, before it makes them orthogonal
    orthogonalized = reference.orthogonalized

    def recorded(U: Tensor, num_steps: int, least_rms: float) -> Tensor:
        updates.append(U)
        return orthogonalized(U, num_steps, least_rms)

    monkeypatch.setattr(reference, "orthogonalized", recorded)
    ref = two_sided_reference(
        W.float().double(), **options, stagger_offsets=optimizer._stagger_offsets()[0]
    )
    for grad in grads:
        param.grad = grad.float().to(param.device)
        optimizer.step()
        ref.step(grad.float().double())
    state = optimizer.state[param]
    assert state["refreshes"].tolist() == ref.refreshes
    assert sum(ref.refreshes) > steps / 4
    turning = max(amplification(F) for F in (ref.L, ref.R) if F is not None)
    rounding = gamma(2 * sum(shape), torch.float32)
    length = steps * optimizer.param_groups[0]["lr"]
    assert len(updates) == (ref.t if "orthogonalize" in options else 0)
    if updates:
        # Entries of D err by turning * rounding; those of X by what its norm may.
        starts = [U / (U @ U.T).norm() ** 0.5 for U in updates]
        growths = [newton_schulz_growth(X, options["orthogonalize"]) * X.norm() for X in starts]
        size = (shape[0] * shape[1]) ** 0.5
        errors = [4 * size / float(U.norm()) * g for U, g in zip(updates, growths, strict=True)]
        length *= 0.2 * max(shape) ** 0.5 * float(sum(errors)) / len(errors)
    bound = turning * rounding * length + steps * gamma(1, torch.float32) * float(W.abs().max())
    assert float((param.cpu().double() - ref.W).abs().max()) <= bound
    for key in ("L", "R"):
        if key in state:
            Q, F = state[f"Q_{key}"].cpu().double(), state[key].cpu().double()
            assert float((Q @ F @ Q.T - getattr(ref, key)).norm()) <= steps * rounding
    assert state["rho"].tolist() == pytest.approx(list(ref.rho), rel=steps * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_precision", ["stochastic", "master"])
def test_the_same_steps_give_the_same_bits(dtype: torch.dtype, low_precision: str) -> None:
    optimizers = [DyKAF(parameters(dtype), low_precision=low_precision) for _ in range(2)]
    for optimizer in optimizers:
        run(optimizer, range(12))
    assert everything(optimizers[0]) == everything(optimizers[1])
    assert float(optimizers[0].state[params_of(optimizers[0])[0]]["refreshes"].sum()) > 4


def test_a_stack_is_its_matrices() -> None:
    stack = randn(3, 6, 4, seed=1, dtype=torch.float32).to(backends.device())
    parts = [stack[i].clone() for i in range(3)]
    schedule = {"refresh_schedule": "fixed", "precondition_frequency": 3}
    whole = DyKAF([stack], batch_dims=1, **schedule)
    apart = DyKAF(parts, **schedule)
    for step in range(12):
        stack.grad = gradient(stack, step, 0)
        for i, part in enumerate(parts):
            part.grad = stack.grad[i].clone()
        whole.step()
        apart.step()
    for i, part in enumerate(parts):
        assert torch.equal(stack[i], part)
        for key, value in apart.state[part].items():
            assert torch.equal(whole.state[stack][key][i], value), key


def several(num: int, shape: tuple[int, int]) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=torch.float32).to(backends.device()) for i in range(num)]


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (2, 130), (130, 2)])
@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
def test_matrices_refreshed_together_are_as_alone(
    shape: tuple[int, int], second_moment: str
) -> None:
    """Products over a batch may round otherwise than one; a mix-up of matrices is of order one."""
    options = {"second_moment": second_moment, "precondition_frequency": 1, "eps": 1e-2}
    together = DyKAF(several(4, shape), **options)
    apart = [DyKAF([param], **options) for param in several(4, shape)]
    params = params_of(together)
    start = [param.clone() for param in params]
    grads = [separated_gradients(shape, 12) for _ in params]
    for step in range(12):
        for idx, (param, alone) in enumerate(zip(params, apart, strict=True)):
            grad = (grads[idx][step] * (idx + 1)).roll(idx, 0).float().to(param.device)
            param.grad, params_of(alone)[0].grad = grad, grad.clone()
            alone.step()
        together.step()
    for param, alone, begin in zip(params, apart, start, strict=True):
        twin = params_of(alone)[0]
        assert float((param - twin).norm()) <= 1e-3 * float((twin - begin).norm())
        for key in ("refreshes", "refresh_fallbacks", "next_refresh"):
            assert torch.equal(together.state[param][key], alone.state[twin][key])


def test_the_drift_of_every_basis_is_corrected() -> None:
    """At the 32nd refresh: lengths of 1 + e come back to 1 - 1.5 e^2."""
    optimizer = two_sided(several(3, (6, 4)), precondition_frequency=1)
    run(optimizer, range(3))
    states = [optimizer.state[param] for param in params_of(optimizer)]
    for refreshes, remaining in ((30, 2 * 1e-2), (31, 2 * 1.5e-4)):
        for state in states:
            state["refreshes"].fill_(refreshes)
            for side in "LR":
                Q = state[f"Q_{side}"].double()
                state[f"Q_{side}"].copy_(torch.linalg.qr(Q).Q * 1.01)
        optimizer.refresh()
        for state in states:
            for Q in (state["Q_L"], state["Q_R"]):
                error = float((Q.mT @ Q - torch.eye(len(Q)).to(Q)).diagonal().abs().max())
                assert error == pytest.approx(remaining, rel=0.05)


@pytest.mark.parametrize("shape", [(6, 4), (2, 130), (2, 4200)])
@pytest.mark.parametrize("second_moment", ["full", "rank_one", "factored"])
def test_the_launches_of_a_refresh_do_not_grow_with_the_matrices(
    shape: tuple[int, int], second_moment: str
) -> None:
    """Counted as torch's operations that are not views."""

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.total += not func.is_view
            return func(*args, **(kwargs or {}))

    totals = []
    for num in (2, 7):
        options = {"second_moment": second_moment, "precondition_frequency": 1}
        optimizer = two_sided(several(num, shape), **options)
        run(optimizer, range(3))
        before = optimizer.state[params_of(optimizer)[0]]["refreshes"].sum()
        with Count() as count:
            optimizer.refresh()
        assert optimizer.state[params_of(optimizer)[-1]]["refreshes"].sum() == before + 2
        totals.append(count.total)
    assert totals[0] == totals[1] > 20


# ---- What the GPU reads by itself ----------------------------------------------------------------


def test_lr_may_be_a_tensor_on_the_device() -> None:
    number, tensor = (
        DyKAF(parameters(), lr=0.25),
        DyKAF(parameters(), lr=torch.tensor(0.25)),
    )
    tensor.param_groups[0]["lr"] = tensor.param_groups[0]["lr"].to(backends.device())
    run(number, range(4))
    run(tensor, range(4))
    tensor.param_groups[0]["lr"].fill_(0.125)
    number.param_groups[0]["lr"] = 0.125
    run(number, range(4, 8))
    run(tensor, range(4, 8))
    assert everything(number) == everything(tensor)


@pytest.mark.parametrize("maximize", [False, True])
def test_grad_scale_is_divided_out(maximize: bool) -> None:
    plain, scaled = (DyKAF(parameters(), maximize=maximize) for _ in range(2))
    run(plain, range(8))
    scaled.grad_scale = torch.tensor(1024.0, device=backends.device())
    scaled.found_inf = torch.tensor(0.0, device=backends.device())

    def scale(step: int) -> None:
        for param in params_of(scaled):
            param.grad.mul_(1024)

    run(scaled, range(8), scale)
    assert scaled.skipped_steps == 0
    assert everything(plain) == everything(scaled)


def test_the_host_reads_nothing_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = DyKAF(parameters(), precondition_frequency=1)
    run(optimizer, range(2))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, device=backends.device())
    optimizer.grad_scale = torch.tensor(2.0, device=backends.device())
    optimizer.found_inf = torch.tensor(0.0, device=backends.device())

    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    optimizer._skips.hear()  # what has come from the step before is on the host
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, read)
    optimizer.step()
    monkeypatch.undo()
    assert all(float(optimizer.state[p]["step"]) >= 2 for p in params_of(optimizer))


@pytest.mark.parametrize("where", ["matrix", "vector", "found_inf"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize(
    "options", [{}, {"orthogonalize": 3, "nesterov": True}], ids=["", "orthogonal"]
)
def test_a_step_that_is_not_finite_is_skipped(
    where: str, bad: float, start: int, options: dict[str, Any]
) -> None:
    """Nothing but the count of the schedule moves, although a refresh is due at every step.

    tests/test_skinny.py tells what happens to skinny matrices.
    """
    params = parameters()[:-1]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}]
    optimizer = DyKAF(groups, precondition_frequency=1, **options)
    run(optimizer, range(start))
    before = everything(optimizer) if start else [bits(param) for param in params]
    for idx, param in enumerate(params):
        param.grad = gradient(param, start, idx)
    if where == "found_inf":
        optimizer.found_inf = torch.tensor(1.0, device=backends.device())
    else:
        params[{"matrix": 1, "vector": 2}[where]].grad.view(-1)[-1] = bad
    optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2
    if start:
        assert everything(optimizer) == before
    else:
        assert [bits(param) for param in params] == before
        assert not any(
            value.any() for state in optimizer.state.values() for value in state.values()
        )
    if where == "found_inf":
        del optimizer.found_inf
    run(optimizer, range(start, start + 3))
    assert optimizer.skipped_steps == 2
    counter = optimizer._skips.on_gpu
    optimizer.skipped_steps = 7
    assert optimizer._skips.on_gpu is counter  # a graph that adds to it may be alive
    assert optimizer.skipped_steps == 7
    assert all(param.isfinite().all() for param in params)
    assert [bits(param) for param in params] != before


def test_raise_names_the_gradient_and_changes_nothing() -> None:
    params = parameters()
    optimizer = DyKAF([{"params": params[:2]}, {"params": params[2:], "nonfinite": "raise"}])
    run(optimizer, range(5))
    before = everything(optimizer)
    params[3].grad[2, 3] = float("nan")
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[1\]\['params'\]\[1\]: exp"):
        optimizer.step()
    assert everything(optimizer) == before
    assert optimizer.skipped_steps == 0


def test_propagate_goes_on() -> None:
    params = parameters()
    optimizer = DyKAF(params, nonfinite="propagate")
    run(optimizer, range(3))
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert params[0].isnan().any() and params[1].isfinite().all()


# ---- State ---------------------------------------------------------------------------------------


def test_the_schedule_is_kept_on_the_cpu() -> None:
    params = parameters()
    optimizer = DyKAF(params)
    run(optimizer, range(2))
    other = DyKAF(parameters())
    other.load_state_dict(optimizer.state_dict())
    for checked in (optimizer, other, copy.deepcopy(optimizer)):
        for param in params_of(checked):
            for key, value in checked.state[param].items():
                assert value.device == (
                    torch.device("cpu") if key in HOST_KEYS else param.device
                ), key


def test_a_loaded_run_goes_on_bit_for_bit() -> None:
    first, second = DyKAF(parameters()), DyKAF(parameters())
    run(first, range(7))
    params_of(first)[0].grad[0, 0] = float("nan")
    first.step()
    with torch.no_grad():
        for mine, theirs in zip(params_of(second), params_of(first), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(first.state_dict())
    assert second.skipped_steps == 1
    first.load_state_dict(first.state_dict())
    assert first.skipped_steps == 1
    run(first, range(7, 14))
    run(second, range(7, 14))
    assert everything(second) == everything(first)


def test_float64_beside_what_the_kernels_take() -> None:
    """In one group: torch's own operations serve it, as exactly as on the CPU."""
    shape = (5, 7)
    W = randn(*shape, seed=3)
    grads = separated_gradients(shape, 20)
    wide, narrow = W.clone().to(backends.device()), W.float().to(backends.device())
    optimizer = two_sided([narrow, wide], precondition_frequency=5, eps=1e-2)
    offsets = optimizer._stagger_offsets()
    ref = two_sided_reference(W, precondition_frequency=5, eps=1e-2, stagger_offsets=offsets[1])
    for grad in grads:
        for param in (wide, narrow):
            param.grad = grad.to(param)
        optimizer.step()
        ref.step(grad)
    travelled = float((ref.W - W).abs().max())
    assert float((wide.cpu() - ref.W).abs().max()) <= TRAJECTORY * travelled
    assert float((narrow.cpu() - ref.W).abs().max()) <= 1e-2 * travelled
    backend = "aten" if backends.BACKEND.startswith("aten") else "cuda"
    report = optimizer.diagnostics()
    assert [entry["backend"] for entry in list(report.values())[1:]] == [backend, "aten"]


def test_diagnostics() -> None:
    optimizer = two_sided(parameters())
    run(optimizer, range(9))
    report = optimizer.diagnostics()
    assert report["optimizer"] == {"skipped_steps": 0}
    for entry in list(report.values())[1:3]:
        assert entry["step"] == 8 and 0 < entry["update_rms"] < 10
        assert entry["orthogonality_L"] < 1e-5 and entry["refresh_fallbacks"] == 0


# ---- On hardware ---------------------------------------------------------------------------------


@on_hardware
def test_no_step_waits_for_the_gpu() -> None:
    optimizer = DyKAF(parameters(), precondition_frequency=2)
    run(optimizer, range(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(optimizer.state[params_of(optimizer)[0]]["refreshes"].min()) >= 2


@on_hardware
def test_parameters_on_cpu_and_gpu_step_together() -> None:
    mixed = [param.cpu() if i % 2 else param for i, param in enumerate(parameters())]
    on_gpu = DyKAF(parameters())
    optimizer = DyKAF(mixed)
    run(optimizer, range(6))
    run(on_gpu, range(6))
    assert torch.equal(mixed[0], params_of(on_gpu)[0])
    before = everything(optimizer)
    mixed[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1 and everything(optimizer) == before


@on_hardware
def test_the_current_stream_is_used() -> None:
    optimizer, other = DyKAF(parameters()), DyKAF(parameters())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(other, range(6))
    stream.synchronize()
    run(optimizer, range(6))
    assert everything(optimizer) == everything(other)
