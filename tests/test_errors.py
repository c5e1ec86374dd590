"""Bad input: the exact message, and everything as before, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_helpers import (
    bits,
    frozen,
    gradient,
    parameter,
    params_of,
    randn,
    refuses,
    run,
    trajectory,
)
from torch import Tensor, nn

from dykaf import DyKAF
from dykaf.checks import check_grad

pytestmark = pytest.mark.usefixtures("each_optimizer")

# ---- Options -------------------------------------------------------------------------------------

FINITE = "a finite number >= 0"
FLAG = "True or False"
DECAY = "two numbers in [0, 1)"
LR = "a finite number or one-element tensor >= 0"
NAN, INF = math.nan, math.inf
NOT_NUMBERS = ["0.1", None, True, [0.1], 1j]

BAD_OPTIONS: dict[str, tuple[str, list[Any]]] = {
    "lr": (
        LR,
        [
            *NOT_NUMBERS,
            NAN,
            INF,
            torch.ones(2),
            torch.tensor(NAN),
            torch.tensor(INF),
            torch.tensor(True),
            torch.tensor(1j),
            torch.empty(0),
        ],
    ),
    "betas": (
        DECAY,
        [
            *NOT_NUMBERS,
            0.9,
            (0.9,),
            (0.9, 0.9, 0.9),
            (1.0, 0.9),
            (0.9, 1.0),
            (-0.1, 0.9),
            (0.9, -0.1),
            (NAN, 0.9),
            (0.9, NAN),
            ("0.9", 0.9),
            (None, 0.9),
            (0.9, True),
            {0.9, 0.8},
        ],
    ),
    "eps": (FINITE, [*NOT_NUMBERS, -1e-12, NAN, INF]),
    "weight_decay": (FINITE, [*NOT_NUMBERS, -1e-12, NAN, INF]),
    "factor_beta": (
        "None or a number in [0, 1)",
        [
            "0.1",
            True,
            [0.1],
            1j,
            -0.1,
            1.0,
            1,
            NAN,
            INF,
        ],
    ),
    "precondition_frequency": (
        "an integer in [1, 2**62)",
        [*NOT_NUMBERS, 2**62, 0, -1, 10.0, NAN, INF],
    ),
    "max_precond_dim": ("an integer >= 0", [*NOT_NUMBERS, -1, 10.0, NAN, INF]),
    "skinny_rank": ("an integer in [0, 2**30)", [*NOT_NUMBERS, -1, 2**30, 0.0]),
    "integrator": ("one of 'ksl', 'bug', 'diagonal'", ["KSL", "", None, 0, b"ksl", ["ksl"]]),
    "init": ("one of 'identity', 'rank_one'", ["eye", "", None, 1]),
    "second_moment": ("one of 'full', 'rank_one', 'factored', 'none'", ["half", None, 1, True]),
    "refresh_schedule": ("one of 'geometric', 'fixed'", ["linear", None, 1]),
    "rescale_exp_avg_sq": (FLAG, [0, 1, None, "True"]),
    "sides": ("one of 'one', 'both', 'none'", ["left", 1, None, True]),
    "nesterov": (FLAG, [0, 1, None, "True"]),
    "orthogonalize": ("an integer in [0, 20]", [-1, 21, 1.0, True, None, "3"]),
    "matmul_precision": (
        "one of None, 'highest', 'high', 'medium'",
        ["low", "", 0, False, "ieee"],
    ),
    "batch_dims": ("None or an integer >= 0", ["0.1", True, [0.1], 1j, -1, 1.0]),
    "state_dtype": ("one of 'float32', 'bfloat16'", ["float16", None, torch.bfloat16]),
    "low_precision": ("one of 'stochastic', 'master'", ["nearest", None, 1]),
    "seed": ("an integer in [0, 2**64)", [*NOT_NUMBERS, -1, 2**64, 0.0]),
    "maximize": (FLAG, [0, 1, None, "True"]),
    "nonfinite": ("one of 'skip', 'raise', 'propagate'", ["ignore", None, 0]),
}

CASES = [
    pytest.param(name, expected, value, id=f"{name}-{value!r}")
    for name, (expected, values) in BAD_OPTIONS.items()
    for value in values
]


@pytest.mark.parametrize("lr", [-1e-9, torch.tensor(-1.0)], ids=repr)
def test_a_negative_lr_is_refused_where_it_is_set(lr: Any) -> None:
    """Schedulers may go below zero later: test_torch_behaviour.py."""
    message = f"lr: expected {LR}, got {lr!r}"
    for arguments in ({"lr": lr}, {"lr": 1.0, "params": [{"params": [parameter(3)], "lr": lr}]}):
        with pytest.raises(ValueError) as caught:
            DyKAF(**{"params": [parameter(3)], **arguments})
        assert str(caught.value) == message
    optimizer = DyKAF([parameter(3)])
    with refuses(optimizer, message):
        optimizer.add_param_group({"params": [parameter(3)], "lr": lr})


@pytest.mark.of_dykaf
def test_every_option_has_its_bad_values() -> None:
    defaults = DyKAF([parameter(2)]).defaults
    assert set(BAD_OPTIONS) == set(defaults)


@pytest.mark.of_dykaf
@pytest.mark.parametrize(("name", "expected", "value"), CASES)
def test_bad_options(name: str, expected: str, value: Any) -> None:
    """At construction, in a group, in a group added late, and changed before a step."""
    message = f"{name}: expected {expected}, got {value!r}"
    for arguments in (
        {"params": [parameter(3)], name: value},
        {"params": [{"params": [parameter(3)], name: value}]},
    ):
        with pytest.raises(ValueError) as caught:
            DyKAF(**arguments)
        assert str(caught.value) == message

    optimizer = DyKAF([parameter(4, 3), parameter(3)])
    run(optimizer, range(3))
    late = parameter(3)
    with refuses(optimizer, message):
        optimizer.add_param_group({"params": [late], name: value})
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with refuses(optimizer, message):
        optimizer.step()
    optimizer.param_groups[0][name] = good
    optimizer.add_param_group({"params": [late]})
    run(optimizer, range(3, 5))

    undisturbed = DyKAF([parameter(4, 3), parameter(3)])
    run(undisturbed, range(3))
    undisturbed.add_param_group({"params": [parameter(3)]})
    run(undisturbed, range(3, 5))
    assert trajectory(optimizer) == trajectory(undisturbed)


def test_a_bad_option_of_a_later_group_stops_the_step_of_all() -> None:
    optimizer = DyKAF([{"params": [parameter(4, 3)]}, {"params": [parameter(3)]}])
    run(optimizer, range(3))
    optimizer.param_groups[1]["eps"] = -1.0
    with refuses(optimizer, f"eps: expected {FINITE}, got -1.0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", 0.0),
        ("lr", torch.tensor([0.1])),
        ("lr", torch.tensor(1)),
        ("betas", (0, 0)),
        ("betas", [0.9, 0.0]),
        ("eps", 0),
        ("weight_decay", 0),
        ("weight_decay", 5),
        ("factor_beta", 0),
        ("factor_beta", 0.999),
        ("precondition_frequency", 1),
        ("precondition_frequency", 10**12),
        ("precondition_frequency", 2**62 - 1),
        ("max_precond_dim", 0),
        ("max_precond_dim", 2**70),
        ("batch_dims", 7),
        ("seed", 2**64 - 1),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(name: str, value: Any) -> None:
    """And work: a few steps leave everything finite. ("Never refresh" is a large period.)"""
    optimizer = DyKAF([parameter(4, 3), parameter(3)], **{name: value})
    run(optimizer, range(4))
    for param in params_of(optimizer):
        assert bool(param.isfinite().all())
        state = optimizer.state[param]
        assert all(bool(entry.isfinite().all()) for entry in state.values())
        assert float(state["step"]) == (4 if "rho" not in state else 3)


def test_a_period_beyond_64_bits_is_refused_or_works() -> None:
    """It must not fail in a step, when other groups have changed already."""
    try:
        optimizer = DyKAF([parameter(4, 3)], precondition_frequency=2**63)
    except ValueError:
        return
    run(optimizer, range(3))
    assert float(optimizer.state[params_of(optimizer)[0]]["step"]) == 2


@pytest.mark.of_dykaf
def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="precondition_freq"):
        DyKAF([parameter(3)], precondition_freq=3)  # type: ignore[call-arg]


# ---- Parameters ----------------------------------------------------------------------------------

DTYPES = "torch.float64, torch.float32, torch.bfloat16, torch.float16"


def _sparse() -> Tensor:
    return torch.eye(3).to_sparse()


BAD_PARAMS = {
    "complex": (
        lambda: nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)),
        f"expected dtypes {DTYPES}, got torch.complex64",
    ),
    "float8": (
        lambda: nn.Parameter(torch.zeros(3, 3).to(torch.float8_e4m3fn)),
        f"expected dtypes {DTYPES}, got torch.float8_e4m3fn",
    ),
    "lazy complex": (
        lambda: nn.UninitializedParameter(dtype=torch.complex64),
        f"expected dtypes {DTYPES}, got torch.complex64",
    ),
    "meta complex": (
        lambda: nn.Parameter(torch.zeros(3, device="meta", dtype=torch.complex64)),
        f"expected dtypes {DTYPES}, got torch.complex64",
    ),
    "sparse": (
        lambda: nn.Parameter(_sparse()),
        "expected dense tensors, got torch.sparse_coo on cpu",
    ),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_bad_parameters(kind: str) -> None:
    make, message = BAD_PARAMS[kind]
    with pytest.raises(ValueError) as caught:
        DyKAF([parameter(3), make()])
    assert str(caught.value) == f"param_groups[0]['params'][1]: {message}"
    optimizer = DyKAF([parameter(3)])
    run(optimizer, range(2))
    good = parameter(4)
    with refuses(optimizer, f"param_groups[1]['params'][1]: {message}"):
        optimizer.add_param_group({"params": [good, make()], "lr": 0.5})
    optimizer.add_param_group({"params": [good]})
    assert optimizer.param_groups[1]["lr"] == 1e-2
    run(optimizer, range(2, 4))
    assert float(optimizer.state[good]["step"]) == 2


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.device_mesh.DeviceMesh("cpu", [0])
    distributed.destroy_process_group()


def test_gradients_are_sharded_as_their_parameters_are(mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    plain = torch.randn(4, 3)
    sharded = distribute_tensor(plain, mesh)
    message = "^gradient of w: expected {} as the parameter, got {}$"
    with pytest.raises(ValueError, match=message.format("a plain tensor", "a DTensor")):
        check_grad("w", plain, sharded)
    with pytest.raises(ValueError, match=message.format("a DTensor", "a plain tensor")):
        check_grad("w", sharded, plain)


def test_a_parameter_that_overlaps_itself_is_refused() -> None:
    """It cannot be written, at construction or at the latest before anything has changed."""
    other = parameter(4, 3)
    overlapping = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    before = bits(other)
    try:
        optimizer = DyKAF([other, overlapping])
    except ValueError:
        return
    for param in (other, overlapping):
        param.grad = gradient(param, 0, 0)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert bits(other) == before
    assert not optimizer.state.get(other)


@pytest.mark.parametrize(
    ("params", "error"), [([], ValueError), (parameter(3), TypeError), ([3.0], TypeError)]
)
def test_what_is_no_list_of_parameters(params: Any, error: type[Exception]) -> None:
    """torch's own checks."""
    with pytest.raises(error):
        DyKAF(params)


def test_a_parameter_twice_is_refused() -> None:
    param = parameter(3)
    optimizer = DyKAF([param])
    run(optimizer, range(2))
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    assert frozen(optimizer) == before


# ---- Gradients -----------------------------------------------------------------------------------

NAME = "param_groups[0]['params'][1]"


def _optimizer() -> DyKAF:
    optimizer = DyKAF([parameter(5), parameter(3, 3), parameter(4, 3)])
    run(optimizer, range(3))
    for idx, param in enumerate(params_of(optimizer)):
        param.grad = gradient(param, 3, idx)
    return optimizer


def test_sparse_gradients() -> None:
    optimizer = _optimizer()
    params_of(optimizer)[1].grad = _sparse()
    with refuses(optimizer, f"gradient of {NAME}: expected a dense tensor, got torch.sparse_coo"):
        optimizer.step()


def test_sparse_gradient_of_an_embedding() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = DyKAF(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    message = "gradient of weight: expected a dense tensor, got torch.sparse_coo"
    with refuses(optimizer, message):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    """torch keeps the two equal by itself, but for ``grad_dtype`` and for new ``data``."""
    optimizer = _optimizer()
    param = params_of(optimizer)[1]
    if hasattr(param, "grad_dtype"):
        param.grad = None
        param.grad_dtype = dtype
        param.grad = gradient(param, 3, 1).to(dtype)
        expected = f"torch.float32 (3, 3) on cpu as the parameter, got {dtype} (3, 3) on cpu"
    else:
        param.data = param.detach().to(dtype)
        expected = f"{dtype} (3, 3) on cpu as the parameter, got torch.float32 (3, 3) on cpu"
    with refuses(optimizer, f"gradient of {NAME}: expected {expected}"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 4), (9,), (1, 3, 3)])
def test_gradients_of_another_shape(shape: tuple[int, ...]) -> None:
    """Also of the same number of elements."""
    optimizer = _optimizer()
    param = params_of(optimizer)[1]
    param.data = randn(*shape, dtype=torch.float32)
    expected = f"torch.float32 {shape} on cpu as the parameter, got torch.float32 (3, 3) on cpu"
    with refuses(optimizer, f"gradient of {NAME}: expected {expected}"):
        optimizer.step()


def test_parameters_that_moved_to_a_device_without_memory() -> None:
    optimizer = _optimizer()
    param = params_of(optimizer)[1]
    before = frozen(optimizer)
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().to("meta")))
    param.grad = torch.zeros(3, 3, device="meta")
    with pytest.raises(ValueError, match="expected a dense tensor with memory"):
        optimizer.step()
    others = [0, 2]
    after = frozen(optimizer)
    assert after["state"] == before["state"]
    assert [bits(params_of(optimizer)[idx]) for idx in others] == [
        before["params"][idx] for idx in others
    ]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_became_of_a_dtype_without_backend(dtype: torch.dtype) -> None:
    optimizer = _optimizer()
    param = params_of(optimizer)[1]
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().to(dtype), requires_grad=False))
    param.grad = torch.zeros_like(param)
    before = frozen(optimizer)
    with pytest.raises(ValueError):
        optimizer.step()
    assert frozen(optimizer) == before
