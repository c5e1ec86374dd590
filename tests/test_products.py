"""Products that cuBLAS computes: the rules' file, and steps on a device that follow them.

Under `--backend simt` tests/simt/cublas_on_host.cpp stands for cuBLAS, with operands rounded as the
kernels do it; on a GPU it is torch's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
from optim_helpers import bits, gradient, randn, run
from torch import Tensor

from dykaf import _C, DyKAF, ops, products

on_device = pytest.mark.skipif(
    "__import__('backends').BACKEND not in ('simt', 'cuda')", reason="of the CUDA backend"
)
on_host = pytest.mark.skipif(
    "__import__('backends').BACKEND != 'simt'", reason="counts the calls of the host executor"
)

ANY = "\n".join(f"0.0-99.9 {precision} any 1- 1- 1- cublas" for precision in products.PRECISIONS)
# Wide and tall, a pair of one shape, a stack, a vector.
SHAPES = [(6, 9), (11, 5), (4, 4), (4, 4), (7,)]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    ops.use_products()


def use(text: str) -> None:
    ops.set_product_rules(products.parse(text, "a test"))


def optimizer_of(dtype: torch.dtype = torch.float32, **options: Any) -> DyKAF:
    params = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(param.to(backends.device())) for param in params]
    return DyKAF(params, precondition_frequency=4, **{"matmul_precision": "high", **options})


def everything(optimizer: DyKAF) -> list[Any]:
    params = optimizer.param_groups[0]["params"]
    return [
        (bits(p), {key: bits(value) for key, value in optimizer.state[p].items()}) for p in params
    ]


# ---- The file ------------------------------------------------------------------------------------


def test_a_line_is_a_rule_for_each_form() -> None:
    text = "# a comment\n\n9.0-9.9  high  any  768 800- 16-32  cublas  # more\n"
    text += "8.0 medium NT 1 2 3 kernels"
    first, second, third, last = products.parse(text, "x")
    assert [rule.form for rule in (first, second, third)] == ["NN", "TN", "NT"]
    sizes = ((768, 768), (800, products.MOST), (16, 32))
    assert first == ((90, 99), "high", "NN", *sizes, True)
    assert last == ((80, 80), "medium", "NT", (1, 1), (2, 2), (3, 3), False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9.0 high any 1- 1- cublas", "expected capability precision form m n k by, got 6 words"),
        ("9 high any 1- 1- 1- cublas", "capability: expected one as 9.0 or 9.0-9.9, got '9'"),
        ("9.0 highest any 1- 1- 1- cublas", "precision: expected one of high, medium"),
        ("9.0 high sym 1- 1- 1- cublas", "form: expected one of NN, TN, NT, any, got 'sym'"),
        ("9.0 high any 1- x 1- cublas", "n: expected sizes as 768, 768- or 768-1024, got 'x'"),
        ("9.0 high any 9-8 1 1- cublas", "m: expected sizes"),
        ("9.0 high any 1- 1- -5 cublas", "k: expected sizes"),
        ("9.0 high any 1- 1- 99999999999 cublas", "k: expected sizes"),
        ("9.0 high any 1- 1- 1- mkl", "by: expected one of cublas, kernels, got 'mkl'"),
    ],
)
def test_what_is_no_rule_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"file, line 2: {message}"):
        products.parse(f"9.0 high any 1- 1- 1- cublas\n{line}", "file")


def test_the_first_rule_that_fits_decides() -> None:
    rules = products.parse("9.0 high NN 5 6 7 kernels\n9.0-9.9 high any 4- 4- 4- cublas", "x")
    assert not products.are_by_library(rules, 90, "high", "NN", 5, 6, 7)
    assert products.are_by_library(rules, 90, "high", "TN", 5, 6, 7)
    assert products.are_by_library(rules, 91, "high", "NN", 5, 6, 7)
    for capability, precision, sizes in (
        (89, "high", (5, 6, 8)),
        (100, "high", (5, 6, 8)),
        (90, "medium", (5, 6, 8)),
        (90, "high", (3, 6, 8)),
        (90, "high", (5, 3, 8)),
        (90, "high", (5, 6, 3)),
    ):
        assert not products.are_by_library(rules, capability, precision, "NN", *sizes)
    assert products.are_by_library(rules, 90, "high", "NN", 5, 6, 8)


@pytest.mark.parametrize("content", ["9.0 high any 1- 1- 1- cublas", "nonsense", None])
def test_the_environment_names_a_file(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "products.txt"
    if content is not None:
        path.write_text(content)
    environment = {**os.environ, "DYKAF_PRODUCTS": str(path)}
    command = [sys.executable, "-c", "import dykaf"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (content is not None and content[0] == "9")
    if content == "nonsense":
        assert f"{path}, line 1: expected capability" in done.stderr


# ---- Steps ---------------------------------------------------------------------------------------

FORMS = {
    "default": {},
    "both sides": {"sides": "both", "orthogonalize": 0, "integrator": "ksl"},
    "bug": {"sides": "both", "integrator": "bug", "orthogonalize": 2},
    "rank_one": {"second_moment": "rank_one"},
    "without factors": {"sides": "none"},
    "medium": {"matmul_precision": "medium"},
}


def moved(optimizer: DyKAF, steps: int) -> list[Tensor]:
    """How far the parameters go."""
    params = optimizer.param_groups[0]["params"]
    start = [param.detach().cpu().double() for param in params]
    run(optimizer, range(steps))
    return [p.detach().cpu().double() - s for p, s in zip(params, start, strict=True)]


@on_device
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_the_kernels_and_of_torchs_operations(form: str) -> None:
    """Three steps, before a basis is refreshed and turns by what rounding makes of gaps.

    The kernels round the same operands, to 2^-11 of an entry each ("medium": 2^-9), and so does the
    stand-in for cuBLAS: both differ by float32's sums, and from torch's operations on full operands
    by roundings of up to 2 + 3 products' two operands in each of three steps. A product's error is
    that of its operands' norms, and D's entries are G~'s over their own size: the share of a step's
    length that is lost is the square root of a matrix's size times that.
    """
    options = FORMS[form]
    use(ANY)
    library = moved(optimizer_of(**options), 3)
    use("")
    kernels = moved(optimizer_of(**options), 3)
    with ops.aten_alone():
        full = moved(optimizer_of(**options), 3)
    unit = 2.0**-9 if options.get("matmul_precision") == "medium" else 2.0**-11
    sums = 2.0**-24 if backends.BACKEND == "simt" else 4 * unit
    for ours, theirs, exact in zip(library, kernels, full, strict=True):
        size = exact.numel() ** 0.5
        length = float(exact.norm())
        assert float((ours - theirs).norm()) <= 64 * size * sums * length
        assert float((ours - exact).norm()) <= 10 * size * unit * length


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_rules_give_the_same_bits(dtype: torch.dtype) -> None:
    use(ANY)
    first, second = optimizer_of(dtype), optimizer_of(dtype)
    run(first, range(9))
    run(second, range(9))
    assert everything(first) == everything(second)


@on_device
def test_a_step_that_is_skipped_changes_nothing() -> None:
    use(ANY)
    optimizer = optimizer_of(nonfinite="skip")
    run(optimizer, range(3))
    params = optimizer.param_groups[0]["params"]
    before = [bits(param) for param in params]
    for i, param in enumerate(params):
        param.grad = gradient(param, 3, i)
    params[1].grad[0, 0] = float("nan")
    optimizer.step()
    assert [bits(param) for param in params] == before
    run(optimizer, range(4, 6))
    assert all(bool(param.isfinite().all()) for param in params)
    assert [bits(param) for param in params] != before


def calls(text: str, **options: Any) -> list[int]:
    """The products in each call of the library in a step."""
    use(text)
    optimizer = optimizer_of(**options)
    run(optimizer, range(2))
    _C.library_calls()
    run(optimizer, range(2, 3))
    return _C.library_calls()


@on_host
def test_what_the_library_is_asked_for() -> None:
    """Of each shape two rotations, and a product in each of the three Newton-Schulz steps."""
    assert ops.has_cublas()
    counts = calls(ANY)
    assert sum(counts) == 4 * 5
    assert 2 in counts  # the pair of one shape is one call
    assert calls("9.0 high NN 1- 1- 1- cublas") != counts
    # Into the basis of the left side; the pair has its right one.
    assert sum(calls("9.0 high TN 6 9 6 cublas")) == 1


@on_host
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        (ANY, {"matmul_precision": "highest"}),
        (ANY, {"matmul_precision": "medium", "sides": "none", "orthogonalize": 0}),
        ("8.0-8.9 high any 1- 1- 1- cublas", {}),
        ("9.1-99.9 high any 1- 1- 1- cublas", {}),
        ("9.0 medium any 1- 1- 1- cublas", {}),
        ("9.0 high any 12- 1- 1- cublas", {}),
        ("9.0 high any 1- 1- 1- kernels\n" + ANY, {}),
    ],
)
def test_what_it_is_not_asked_for(text: str, options: dict[str, Any]) -> None:
    assert calls(text, **options) == []


@on_host
def test_the_packages_own_rules_take_large_sides_alone() -> None:
    ops.use_products()
    optimizer = optimizer_of()
    run(optimizer, range(3))
    assert _C.library_calls() == []
    rules = products.read(products.DEFAULT_FILE)
    assert products.are_by_library(rules, 90, "high", "NN", 4096, 4096, 4096)


@on_host
def test_new_rules_hold_from_the_next_step_on() -> None:
    """Plans that are kept from one step to the next are made anew."""
    optimizer = optimizer_of()
    for step, (text, expected) in enumerate((("", False), ("", False), (ANY, True), ("", False))):
        use(text)
        run(optimizer, range(2 * step, 2 * step + 2))
        assert (_C.library_calls() != []) == expected
