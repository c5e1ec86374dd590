"""python -m bench.tune: its file, its estimates, and a run under the host executor or on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import tune
from bench.cuda_rates import DEVICES

from dykaf import ops, products

H100, A100 = DEVICES["H100"], DEVICES["A100"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    ops.use_products()


def test_the_packages_file_has_the_estimated_sides() -> None:
    """For all forms on an H100, and nothing for an A100."""
    rules = products.read(products.DEFAULT_FILE)
    for precision in products.PRECISIONS:
        side = tune.least_side(H100, precision)
        assert side is not None and tune.least_side(A100, precision) is None
        for form in products.FORMS:
            for sizes, expected in (
                ((side, side, side), True),
                ((4 * side, side, side), True),
                ((side - 1, side, side), False),
                ((side, side - 1, side), False),
                ((side, side, side - 1), False),
            ):
                for capability in (H100.arch, 100):
                    found = products.are_by_library(rules, capability, precision, form, *sizes)
                    assert found == expected
                for capability in (A100.arch, 89, 120):
                    assert not products.are_by_library(rules, capability, precision, form, *sizes)


def test_estimates_by_hand() -> None:
    """4096 x 4096 with Adam: in our epilogue, or after cuBLAS with six arrays moved once more."""
    kernels, library = tune.estimate(H100, "high", "adam", (4096, 4096), 1)
    array = 4 * 4096**2 / 3.35e12 / (1704 / 2039)
    assert kernels == pytest.approx(2 * 4096**3 / (32 * 9.7e12) / (0.35 / 0.629) + 2.5e-6)
    assert library == pytest.approx(2 * 4096**3 / 402.15e12 + 6 * array + 2 * 2.5e-6)
    _, plain = tune.estimate(H100, "high", "store", (4096, 4096), 1)
    assert library - plain == pytest.approx(6 * array + 2.5e-6)


def test_products_of_a_matrix() -> None:
    """Into the basis and out of it, as the plan has them; B X of Newton-Schulz is like one."""
    assert tune.classes_of((768, 3072)) == [("TN", 768, 3072, 768), ("NN", 768, 3072, 768)]
    assert tune.classes_of((3072, 768)) == [("NN", 3072, 768, 768), ("NT", 3072, 768, 768)]


def test_the_file_puts_what_was_measured_first() -> None:
    wide = tune.Class("TN", 4096, 8192, 4096)
    slow, fast, even = (tune.Timed(wide, "high", 10.0, ms) for ms in (12.0, 8.0, 9.9))
    for timed, expected in ((slow, False), (fast, True), (even, False)):
        rules = products.parse(tune.file_of([timed], 90, "cpu"), "a file")
        assert products.are_by_library(rules, 90, "high", *wide) == expected
        # All else is as in the package's own file.
        assert products.are_by_library(rules, 90, "medium", *wide)
        assert products.are_by_library(rules, 90, "high", "TN", 4096, 8193, 4096)
        assert products.are_by_library(rules, 91, "high", *wide)
        assert not products.are_by_library(rules, 80, "high", *wide)


@pytest.mark.skipif(
    "__import__('backends').BACKEND not in ('simt', 'cuda')", reason="of the CUDA backend"
)
def test_it_writes_rules_that_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it timed: the shape's two forms at two precisions."""
    path = tmp_path / "products.txt"
    turns = itertools.cycle((2.0, 3.0, 1.0))  # the kernels, the first form by cuBLAS, the second
    seconds = tune.seconds

    def timed(function: Callable[[], object], device: str) -> float:
        seconds(function, device)
        return next(turns)

    monkeypatch.setattr(tune, "seconds", timed)
    arguments = ["--out", str(path), "--shapes", "8x12", "--rounds", "2", "--matrices", "2"]
    tune.main(arguments)
    assert "export DYKAF_PRODUCTS=" in capsys.readouterr().out
    own = products.read(products.DEFAULT_FILE)
    rules = products.read(path)
    assert len(rules) == len(own) + 2 * 2
    assert [rule[3:6] for rule in rules[:4]] == 4 * [((8, 8), (12, 12), (8, 8))]
    assert [(rule.precision, rule.form) for rule in rules[:4]] == [
        (precision, form) for precision in products.PRECISIONS for form in ("TN", "NN")
    ]
    assert [rule.by_library for rule in rules[:4]] == [False, True, False, True]


@pytest.mark.skipif("__import__('backends').BACKEND != 'cpu'", reason="needs no GPU")
def test_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs a GPU of the CUDA backend" in capsys.readouterr().err
