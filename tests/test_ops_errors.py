"""dykaf.ops refuses what does not fit, before anything has changed.

Calls that would read or write through wrong pointers run in a process of their own, so that a
missing check shows as a failure and not as the end of the test run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_helpers import bits, gradient, parameter, randn, two_sided
from torch import Tensor

from dykaf import ops
from dykaf.options import StepOptions, step_options
from dykaf.state import Layout, State, new_state

SHAPES = [(4, 3), (2, 5)]


class Inputs:
    """Two matrices with state after their first gradient, and all that the operations take."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.params: list[Tensor] = [
            parameter(*shape, seed=idx, dtype=dtype).detach() for idx, shape in enumerate(SHAPES)
        ]
        group = two_sided([torch.zeros(1)], **options).param_groups[0]
        self.options: StepOptions = step_options(group, 1.0)
        self.grads = [gradient(param, 0, idx) for idx, param in enumerate(self.params)]
        self.states: list[State] = [
            new_state(param, Layout.of(param, group)) for param in self.params
        ]
        self.streams = [0, 1]
        self.offsets = [(0, 0), (0, 0)]
        ops.initialize_(self.grads, self.states, self.offsets, self.options)

    @property
    def maxima(self) -> Tensor:
        return torch.stack([grad.abs().max() for grad in self.grads]).double()

    def frozen(self) -> list[Any]:
        return [
            [bits(param) for param in self.params],
            [
                {key: bits(value) for key, value in state.items() if isinstance(value, Tensor)}
                for state in self.states
            ],
        ]

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Every operation on these inputs."""
        return {
            "rotate": lambda: ops.rotate(self.grads, self.states, True, self.options),
            "adam_update_": lambda: ops.adam_update_(self.grads, self.states, self.options),
            "factor_update_": lambda: ops.factor_update_(self.grads, self.states, self.options),
            "initialize_": lambda: ops.initialize_(
                self.grads, self.states, self.offsets, self.options
            ),
            "refresh_basis_": lambda: ops.refresh_basis_(self.states, "left", self.options),
            "apply_update_": lambda: ops.apply_update_(
                self.params, self.grads, self.states, self.streams, self.options
            ),
            "step_": lambda: ops.step_(
                self.params,
                self.grads,
                self.maxima,
                self.states,
                self.streams,
                self.offsets,
                self.options,
            ),
        }


OPERATIONS = list(Inputs().calls())
READING_ALL = [operation for operation in OPERATIONS if operation != "apply_update_"]
WITH_GRADS = ["rotate", "adam_update_", "factor_update_", "initialize_", "step_"]


def reads(operation: str, key: str) -> bool:
    """Shards of a parameter take updates where the rest of its state is not."""
    return operation in READING_ALL or key in ("step", "master")


def refuses(
    inputs: Inputs, call: Callable[[], Any], message: str, error: type[Exception] = ValueError
) -> None:
    before = inputs.frozen()
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert inputs.frozen() == before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_inputs_as_they_stand_are_accepted(operation: str) -> None:
    """So that a refusal below is for the reason that is meant."""
    Inputs().calls()[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("key", "spoil", "expected", "got"),
    [
        (
            "exp_avg",
            lambda t: t.t().contiguous().t(),
            "contiguous Float [2, 5] on cpu",
            "Float [2, 5] on cpu, not contiguous",
        ),
        ("L", lambda t: t.double(), "contiguous Float [2, 2] on cpu", "Double [2, 2] on cpu"),
        (
            "R",
            lambda t: t[:4, :4].contiguous(),
            "contiguous Float [5, 5] on cpu",
            "Float [4, 4] on cpu",
        ),
        ("Q_L", lambda t: t.reshape(4), "contiguous Float [2, 2] on cpu", "Float [4] on cpu"),
        ("Q_R", lambda t: t.to("meta"), "contiguous Float [5, 5] on cpu", "Float [5, 5] on meta"),
        (
            "exp_avg_sq",
            lambda t: t[:, :4].contiguous(),
            "contiguous Float [2, 5] on cpu",
            "Float [2, 4] on cpu",
        ),
        ("rho", lambda t: t.float(), "contiguous Double [2] on cpu", "Float [2] on cpu"),
        ("refreshes", lambda t: t.int(), "contiguous Long [2] on cpu", "Int [2] on cpu"),
        ("next_refresh", lambda t: t[:1], "contiguous Long [2] on cpu", "Long [1] on cpu"),
        (
            "refresh_fallbacks",
            lambda t: t.reshape(1),
            "contiguous Long [] on cpu",
            "Long [1] on cpu",
        ),
        ("update_rms", lambda t: t.double(), "contiguous Float [] on cpu", "Double [] on cpu"),
        ("step", lambda t: t.double(), "contiguous Float [] on cpu", "Double [] on cpu"),
    ],
)
def test_state_that_does_not_fit(
    operation: str, key: str, spoil: Callable[[Tensor], Tensor], expected: str, got: str
) -> None:
    """In the second state, when the first is in order."""
    inputs = Inputs()
    inputs.states[1][key] = spoil(inputs.states[1][key])
    if not reads(operation, key):
        inputs.calls()[operation]()
        return
    before = [bits(value) for value in inputs.params + list(inputs.states[0].values())]
    with pytest.raises(ValueError) as caught:
        inputs.calls()[operation]()
    assert str(caught.value) == f"states[1]['{key}']: expected {expected}, got {got}"
    after = [bits(value) for value in inputs.params + list(inputs.states[0].values())]
    assert after == before


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "Q_L", "refreshes"])
def test_state_that_is_missing_or_no_tensor(operation: str, key: str) -> None:
    inputs = Inputs()
    del inputs.states[0][key]
    if not reads(operation, key):
        inputs.calls()[operation]()
        return
    message = f"states[0]['{key}']: expected a tensor, got nothing"
    refuses(inputs, inputs.calls()[operation], message)
    inputs.states[0][key] = 3.5  # type: ignore[assignment]
    before = inputs.frozen()
    with pytest.raises(ValueError, match=rf"^states\[0\]\['{key}'\]: expected a tensor, got "):
        inputs.calls()[operation]()
    assert inputs.frozen() == before


@pytest.mark.parametrize("operation", READING_ALL)
def test_a_state_that_lost_its_factors(operation: str) -> None:
    """It is not one of a matrix that never had any, for it has dates."""
    inputs = Inputs()
    for key in ("L", "R", "Q_L", "Q_R"):
        del inputs.states[0][key]
    refuses(
        inputs,
        inputs.calls()[operation],
        "states[0]['L']: expected a tensor here or at 'R', got nothing",
    )


@pytest.mark.parametrize("operation", WITH_GRADS)
def test_gradients_that_do_not_fit(operation: str) -> None:
    """dtype, size, layout and strides, each by name."""
    for grad, text in (
        (torch.ones(2, 5, dtype=torch.int64), "Long [2, 5] on cpu"),
        (torch.ones(2, 5, dtype=torch.complex64), "ComplexFloat [2, 5] on cpu"),
    ):
        inputs = Inputs()
        call = inputs.calls()[operation]
        maxima = inputs.maxima
        inputs.grads[1] = grad
        if operation == "step_":
            call = _step_with(inputs, maxima)
        expected = "float64, float32, bfloat16 or float16"
        name = "inputs" if operation == "rotate" else "grads"
        refuses(inputs, call, f"{name}[1]: expected {expected}, got {text}")

    name = "inputs" if operation == "rotate" else "grads"
    owner = "parameter" if operation == "step_" else "state"
    inputs = Inputs()
    maxima = inputs.maxima
    inputs.grads[1] = randn(5, 2, dtype=torch.float32).t()
    call = _step_with(inputs, maxima) if operation == "step_" else inputs.calls()[operation]
    message = f"{name}[1]: expected a contiguous tensor, got Float [2, 5] on cpu, not contiguous"
    refuses(inputs, call, message)

    inputs.grads[1] = torch.ones(3, 3)
    message = f"{name}[1]: expected 10 elements, as the state has, got Float [3, 3] on cpu"
    refuses(inputs, call, message)

    inputs.grads[1] = torch.ones(2, 5, dtype=torch.float64)
    message = f"{name}[1]: expected the {owner}'s dtype, got Double [2, 5] on cpu"
    refuses(inputs, call, message)


def _step_with(inputs: Inputs, maxima: Tensor) -> Callable[[], Any]:
    return lambda: ops.step_(
        inputs.params,
        inputs.grads,
        maxima,
        inputs.states,
        inputs.streams,
        inputs.offsets,
        inputs.options,
    )


def test_a_float64_state_wants_float64() -> None:
    inputs = Inputs(torch.float64)
    inputs.grads[0] = inputs.grads[0].float()
    message = "grads[0]: expected the state's dtype, got Float [4, 3] on cpu"
    refuses(inputs, inputs.calls()["factor_update_"], message)


def test_step_wants_gradients_of_the_parameters_dtype() -> None:
    inputs = Inputs()
    inputs.grads[0] = inputs.grads[0].bfloat16()
    message = "grads[0]: expected the parameter's dtype, got BFloat16 [4, 3] on cpu"
    refuses(inputs, _step_with(inputs, inputs.maxima), message)


def test_parameters_that_do_not_fit() -> None:
    for name in ("apply_update_", "step_"):
        inputs = Inputs()
        inputs.params[1] = torch.ones(3, 3)
        message = "params[1]: expected 10 elements, as the state has, got Float [3, 3] on cpu"
        refuses(inputs, inputs.calls()[name], message)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "integrator",
            "euler",
            "options['integrator']: expected one of 'ksl', 'bug', 'diagonal', 'coupled', "
            "got 'euler'",
        ),
        (
            "second_moment",
            "half",
            "options['second_moment']: expected one of 'full', 'rank_one', 'factored', 'none', "
            "got 'half'",
        ),
        ("init", "eye", "options['init']: expected one of 'identity', 'rank_one', got 'eye'"),
        (
            "refresh_schedule",
            "x",
            "options['refresh_schedule']: expected one of 'geometric', 'fixed', got 'x'",
        ),
    ],
)
def test_option_names(operation: str, option: str, value: str, message: str) -> None:
    inputs = Inputs()
    inputs.options[option] = value  # type: ignore[literal-required]
    refuses(inputs, inputs.calls()[operation], message)
    del inputs.options[option]  # type: ignore[misc]
    message = f"options['{option}']: expected a value, got nothing"
    refuses(inputs, inputs.calls()[operation], message)


def test_side() -> None:
    inputs = Inputs()
    refuses(
        inputs,
        lambda: ops.refresh_basis_(inputs.states, "top", inputs.options),
        "side: expected 'left' or 'right', got 'top'",
    )


@pytest.mark.parametrize(
    ("grads", "counts", "message"),
    [
        ([torch.ones(4)], [], "counts: expected one entry per gradient (1), got 0"),
        ([torch.ones(4)], [1, 1], "counts: expected one entry per gradient (1), got 2"),
        ([torch.ones(4)], [3], "counts[0]: expected a positive divisor of 4, got 3"),
        ([torch.ones(4)], [0], "counts[0]: expected a positive divisor of 4, got 0"),
        ([torch.ones(4)], [-2], "counts[0]: expected a positive divisor of 4, got -2"),
        (
            [torch.ones(2, 4)[:, ::2]],
            [1],
            "grads[0]: expected a contiguous tensor, got Float [2, 2] on cpu, not contiguous",
        ),
        (
            [torch.ones(4).int()],
            [1],
            "grads[0]: expected float64, float32, bfloat16 or float16, got Int [4] on cpu",
        ),
        (
            [torch.ones(4, device="meta")],
            [1],
            "grads[0]: expected a dense tensor with memory, got Float [4] on meta",
        ),
    ],
)
def test_grad_max(grads: list[Tensor], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ops.grad_max(grads, counts)
    assert str(caught.value) == message


# ---- Wrong pointers ------------------------------------------------------------------------------


def _vector(inputs: Inputs) -> None:
    """Adds a parameter without factors: operations on the factors have nothing to work on."""
    param = torch.ones(50_000)
    group = two_sided([torch.zeros(1)]).param_groups[0]
    inputs.params = [param]
    inputs.grads = [torch.ones(50_000)]
    inputs.states = [new_state(param, Layout.of(param, group))]
    inputs.streams, inputs.offsets = [0], [(0, 0)]


def _set(name: str, value: Any) -> Callable[[Inputs], None]:
    return lambda inputs: setattr(inputs, name, value)


def _cut(name: str, operation: str, size: int) -> tuple[str, Callable[[Inputs], None]]:
    return operation, lambda inputs: setattr(inputs, name, getattr(inputs, name)[:size])


# Name -> operation and what is wrong.
DANGEROUS: dict[str, tuple[str, Callable[[Inputs], None]]] = {
    f"{operation} {name}[:{size}]": _cut(name, operation, size)
    for size in (0, 1)
    for operation, names in {
        "rotate": ["grads"],
        "adam_update_": ["grads"],
        "factor_update_": ["grads"],
        "initialize_": ["grads", "offsets"],
        "apply_update_": ["params", "grads", "streams"],
        "step_": ["params", "streams", "offsets"],
    }.items()
    for name in names
} | {
    "apply_update_ both empty": (
        "apply_update_",
        lambda inputs: (_set("params", [])(inputs), _set("grads", [])(inputs)),
    ),
    "step_ no gradients": ("step_ fixed maxima", _set("grads", [])),
    "step_ no maxima": ("step_ no maxima", lambda inputs: None),
    "step_ one maximum": ("step_ one maximum", lambda inputs: None),
    "step_ three maxima": ("step_ three maxima", lambda inputs: None),
    "step_ offset pair": ("step_", _set("offsets", [(0, 0), (0, 0, 0)])),
    "apply_update_ short update": (
        "apply_update_",
        lambda inputs: inputs.grads.__setitem__(0, torch.ones(2, 3)),
    ),
    "apply_update_ bfloat16 update": (
        "apply_update_",
        lambda inputs: inputs.grads.__setitem__(0, torch.ones(4, 3).bfloat16()),
    ),
    "apply_update_ strided update": (
        "apply_update_",
        lambda inputs: inputs.grads.__setitem__(0, torch.ones(3, 4).t()),
    ),
    "rotate bfloat16": (
        "rotate",
        lambda inputs: inputs.grads.__setitem__(0, torch.ones(4, 3).bfloat16()),
    ),
    "factor_update_ of a vector": ("factor_update_", _vector),
    "initialize_ of a vector": ("initialize_", _vector),
    "master of another size": (
        "apply_update_",
        lambda inputs: inputs.states[0].__setitem__("master", torch.ones(2, 3)),
    ),
    "one state twice": (
        "step_",
        lambda inputs: inputs.states.__setitem__(1, inputs.states[0]),
    ),
}


def dangerous_call(name: str) -> str:
    """Runs a case in this process: the error, or "accepted"; or the process dies."""
    operation, spoil = DANGEROUS[name]
    inputs = Inputs()
    maxima = inputs.maxima
    spoil(inputs)
    special = {
        "step_ fixed maxima": maxima,
        "step_ no maxima": maxima[:0],
        "step_ one maximum": maxima[:1],
        "step_ three maxima": torch.cat([maxima, maxima[:1]]),
    }
    call = (
        _step_with(inputs, special[operation])
        if operation in special
        else inputs.calls()[operation]
    )
    before = inputs.frozen()
    try:
        call()
    except ValueError as error:
        return f"ValueError: {error}" if inputs.frozen() == before else f"changed, {error}"
    return "accepted"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What each case came to. A process that dies costs its case, and another goes on."""
    results: dict[str, str] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while len(results) < len(DANGEROUS):
        pending = [name for name in DANGEROUS if name not in results]
        process = subprocess.run(
            [sys.executable, __file__, *pending],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=120,
        )
        done = dict(line.split("\t", 1) for line in process.stdout.splitlines())
        results |= done
        if len(done) < len(pending):
            results[pending[len(done)]] = f"died with {process.returncode}: {process.stderr[-300:]}"
    return results


@pytest.mark.parametrize("name", DANGEROUS)
def test_wrong_lists_never_reach_a_pointer(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name].startswith("ValueError: ")
    assert ": expected " in outcomes[name] and ", got " in outcomes[name]


@pytest.mark.parametrize("operation", ["rotate", "factor_update_", "initialize_"])
def test_matrices_without_factors_are_refused_where_factors_are_the_matter(operation: str) -> None:
    inputs = Inputs()
    for key in ("L", "R", "Q_L", "Q_R"):
        inputs.states[0].pop(key, None)
    message = "states[0]['L']: expected a tensor here or at 'R', got nothing"
    refuses(inputs, inputs.calls()[operation], message)


def test_adam_and_rotation_of_a_parameter_without_factors() -> None:
    """Worked out, or refused; and in a process of its own first."""
    script = (
        "import torch; from test_ops_errors import Inputs, _vector\n"
        "inputs = Inputs(); _vector(inputs)\n"
        "for name in ('rotate', 'adam_update_'):\n"
        "    try:\n"
        "        out = inputs.calls()[name]()[0]\n"
        "        assert torch.allclose(out, torch.ones(50_000)), (name, out)\n"
        "    except ValueError as error:\n"
        "        assert ': expected ' in str(error), error\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-500:]


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(f"{case}\t{dangerous_call(case)!s}".replace("\n", " "), flush=True)
