"""The benchmarks: their arithmetic, and that each runs on tiny shapes. No time is judged here."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import two_sided
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import __main__ as cli
from bench import cases, composed, counts, optimizers, scale, timing
from bench.machine import Peaks
from bench.report import flatten
from bench.shapes import SHAPE_SETS, SIZES, Matrix, Workload
from bench.textbook import TextbookDyKAF
from bench.textbook_soap import TextbookSOAP

MATRICES = [Matrix(6, 9, True, True, 1), Matrix(9, 4, True, True, 1), Matrix(5, 30, True, True, 1)]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(*arguments: str) -> int:
    return cli.main([*arguments, "--size", "tiny", "--threads", "1"])


# Counts


def enumerate_product(m: int, k: int, n: int, wanted: Callable[[int, int, int], bool]) -> int:
    """Flops of a product whose entry (row, column) takes only the terms that are wanted."""
    return sum(2 for i in range(m) for j in range(n) for p in range(k) if wanted(i, p, j))


def test_product_counts_against_enumeration() -> None:
    assert counts.product(3, 5, 4) == enumerate_product(3, 5, 4, lambda i, p, j: True)
    assert counts.symmetric_product(5, 3) == enumerate_product(5, 3, 5, lambda i, p, j: j <= i)
    triangle = enumerate_product(6, 6, 6, lambda i, p, j: j >= i and p >= i)
    without = counts.qr(6, 6) + counts.product(6, 6, 6) + counts.product(6, 6, 9)
    assert counts.refresh_flops(6, 9) - without == pytest.approx(triangle)


def test_qr_count_against_householder_reflections() -> None:
    d, k = 400, 200
    # Reflection j changes k - j columns of d - j entries, at four flops each, for R and for Q.
    reflections = 2 * sum(4 * (d - j) * (k - j) for j in range(k))
    assert counts.qr(d, k) == pytest.approx(reflections, rel=0.02)


@pytest.mark.parametrize("x", MATRICES, ids=str)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rotate into", counts.rotate),
        ("factor_update_ ksl", lambda x: counts.factor_update(x, "ksl")),
        ("factor_update_ diagonal", lambda x: counts.factor_update(x, "diagonal")),
        ("step_ ksl", lambda x: counts.step(x, "ksl")),
    ],
)
def test_flops_against_what_torch_counts(
    x: Matrix, name: str, count: Callable[[Matrix], counts.Count]
) -> None:
    inputs = cases.Inputs(Workload("", "", ((x.m, x.n),), 100, 1), "cpu", "highest")
    _, plain = cases.CASES[name].make(inputs)
    with FlopCounterMode(display=False) as counter:
        plain()
    # The plain form computes symmetric results in full.
    upper = 0 if name == "rotate into" else x.m * (x.m - 1) * x.n + x.n * (x.n - 1) * x.m
    assert count(x).flops == counter.get_total_flops() - upper


def test_bug_counts_the_cheaper_coupling() -> None:
    for m, n in ((8, 8), (2, 40)):
        both = enumerate_product(m, m, n, lambda i, p, j: True)
        both += enumerate_product(m, n, n, lambda i, p, j: True)
        gram = enumerate_product(m, n, m, lambda i, p, j: j <= i)
        gram += enumerate_product(m, m, m, lambda i, p, j: True)
        gram += enumerate_product(m, m, m, lambda i, p, j: j <= i)
        assert counts.coupling_flops(m, n) == min(both, gram)


@pytest.mark.parametrize("shape", [(6, 9), (60, 9)], ids=str)
def test_bytes_are_those_of_the_tensors(shape: tuple[int, int]) -> None:
    workload = Workload("", "", (shape,), 50, 1)
    (x,) = workload.matrices()
    state = cases.Inputs(workload, "cpu", "highest").states[0]
    matrix = state["exp_avg"].nbytes
    bases = sum(state[key].nbytes for key in ("Q_L", "Q_R") if key in state)
    assert counts.grad_max(x).bytes == matrix
    assert counts.rotate(x).bytes == 2 * matrix + bases
    assert counts.adam_update(x).bytes == 6 * matrix
    assert counts.apply_update(x).bytes == 3 * matrix
    assert counts.factor_update(x, "ksl").bytes == matrix + 2 * bases
    assert counts.step(x, "ksl").bytes == 7 * matrix + 3 * bases


def test_a_stack_counts_as_its_matrices() -> None:
    stack = Workload("", "", ((3, 6, 9),), 100, 1)
    apart = Workload("", "", ((6, 9),) * 3, 100, 1)
    of_stack = counts.total(counts.rotate, stack.matrices())
    assert of_stack == counts.total(counts.rotate, apart.matrices())


# Arithmetic of the results


def test_summary() -> None:
    times = [3.0, 1.0, 2.0, 10.0, 4.0]
    summary = timing.summarise(times)
    assert (summary.mean, summary.median, summary.worst) == (4.0, 3.0, 10.0)
    expected = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(0.9).double())
    assert summary.p90 == pytest.approx(float(expected))


def test_paired_ratio_takes_whole_blocks() -> None:
    ratio = timing.paired_ratio([1.0, 3.0, 8.0, 8.0, 100.0], [2.0, 2.0, 4.0, 4.0, 1.0], block=2)
    assert ratio is not None
    assert ratio.median == 1.5  # of 4/4 and 16/8; the fifth round has no partner
    assert timing.paired_ratio([1.0], [1.0], block=2) is None


def test_exponent_and_crossing_of_power_laws() -> None:
    xs = [64.0, 128.0, 256.0, 512.0]
    square, cube = [300 * x**2 for x in xs], [x**3 for x in xs]
    assert scale.fitted_exponent(xs, cube) == pytest.approx(3)
    ((place, cube_wins),) = scale.crossings(xs, cube, square)
    assert place == pytest.approx(300)
    assert not cube_wins
    assert scale.crossings(xs, cube, cube) == []


def test_bound_is_the_slower_of_compute_and_memory() -> None:
    peaks = Peaks({"highest": 100.0}, 10.0)
    assert counts.Count(1000, 20).bound(peaks, "highest") == (10.0, "compute")
    assert counts.Count(100, 20).bound(peaks, "highest") == (2.0, "memory")


def test_peak_allocation() -> None:
    def allocate() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 18, dtype=torch.uint8)
        del a
        c = torch.empty(1 << 19, dtype=torch.uint8)
        del b, c

    assert timing.peak_allocation(allocate, "cpu") == (1 << 20) + (1 << 18)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPE_SETS)
def test_sets_keep_their_sides_in_every_size(name: str, size: str) -> None:
    full, other = (SHAPE_SETS[name].workload(s) for s in ("full", size))
    num_params = len(SHAPE_SETS[name].layer)
    for x, y in zip(list(full.matrices())[:num_params], other.matrices(), strict=False):
        assert (x.left, x.right) == (y.left, y.right)
        assert y.m <= x.m
        assert y.n <= x.n


# Operations and their plain-torch forms


@pytest.mark.parametrize("name", cases.CASES)
def test_operations_agree_with_plain_torch(name: str) -> None:
    cases.check_agreement(cases.CASES[name], "cpu")


def test_a_wrong_plain_form_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [1.01 * grad for grad in correct(grads, *arguments)]

    correct = composed.adam_update_
    monkeypatch.setattr(composed, "adam_update_", off)
    with pytest.raises(ArithmeticError, match=r"adam_update_.*differ in output 0"):
        cases.check_agreement(cases.CASES["adam_update_"], "cpu")
    assert run("ops", "--ops", "adam_update_") == 2
    assert "differ in output 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", cases.CASES)
def test_restore_undoes_every_change(name: str) -> None:
    inputs = cases.Inputs(cases.CHECK, "cpu", "highest")
    before = [p.clone() for p in inputs.params], [cases.clone(s) for s in inputs.states]
    for call in cases.CASES[name].make(inputs):
        call()
    inputs.restore()
    assert all(map(torch.equal, inputs.params, before[0]))
    for state, saved in zip(inputs.states, before[1], strict=True):
        assert all(torch.equal(state[key], saved[key]) for key in saved)


# The textbook optimizers


def trajectory(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], grads: list[Tensor]
) -> Tensor:
    W = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = make([W])
    for grad in grads:
        W.grad = grad
        optimizer.step()
    return W.detach()


def random_grads(m: int, n: int, num_steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (num_steps, m, n)
    return list(torch.randn(size, generator=generator, dtype=torch.float64))


def test_textbook_soap_is_equivariant_under_rotations() -> None:
    grads = random_grads(6, 6, 9)
    U, V = torch.linalg.qr(torch.stack(random_grads(6, 6, 2))).Q

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return TextbookSOAP(params, precondition_frequency=3)

    expected = U @ trajectory(make, grads) @ V.T
    torch.testing.assert_close(trajectory(make, [U @ G @ V.T for G in grads]), expected)


def test_textbook_soap_follows_pytorch_optimizer_until_the_first_refresh() -> None:
    other = pytest.importorskip("pytorch_optimizer")
    options: dict[str, Any] = {"weight_decay": 0.0, "eps": 1e-15, "max_precond_dim": 5}
    ours = trajectory(lambda params: TextbookSOAP(params, **options), random_grads(4, 7, 9))
    options["max_precondition_dim"] = options.pop("max_precond_dim")
    theirs = trajectory(lambda params: other.SOAP(params, **options), random_grads(4, 7, 9))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_textbook_dykaf_with_one_factor(shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {
        "bounded": True,
        "weight_decay": 0.0,
        "precondition_frequency": 3,
        "max_precond_dim": 5,
    }
    grads = random_grads(*shape, 9)
    textbook = trajectory(lambda params: TextbookDyKAF(params, **options), grads)
    del options["bounded"]
    options |= {"refresh_schedule": "fixed", "factor_beta": None}
    options |= {"rescale_exp_avg_sq": False, "lr": 3e-3}
    torch.testing.assert_close(
        textbook, trajectory(lambda params: two_sided(params, **options), grads)
    )


# Whole runs


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_files(folder: Path, num_records: int) -> dict[str, Any]:
    """The JSON file's content, after a comparison with the CSV file."""
    report: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    rows = read_csv(folder / "out.csv")
    assert len(report["records"]) == len(rows) == num_records
    for record, row in zip(report["records"], rows, strict=True):
        expected = {key: str(value) for key, value in flatten(record).items()}
        assert {key: value for key, value in row.items() if key in expected} == expected
    for key in ("cpu", "threads", "torch", "blas", "dykaf"):
        assert report["machine"][key]
    return report


def files(folder: Path) -> list[str]:
    return ["--json", str(folder / "out.json"), "--csv", str(folder / "out.csv")]


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["llama3-mlp", "moe"]
    assert run("ops", "--sets", *sets, "--seconds", "0.001", *files(tmp_path)) == 0
    report = check_files(tmp_path, 2 * len(cases.CASES))
    peaks = report["settings"]["peak_flops"]["highest"], report["settings"]["peak_bandwidth"]
    for record in report["records"]:
        times, plain = record["times"], record["plain_times"]
        assert len(times) == len(plain) == record["num_samples"]
        assert record["gflops"] * record["median"] * 1e9 == pytest.approx(record["flops"])
        bound = max(record["flops"] / peaks[0], record["bytes"] / peaks[1])
        assert record["fraction_of_peak"] * record["median"] == pytest.approx(bound)
        ratios = torch.tensor([a / b for a, b in zip(times, plain, strict=True)])
        assert record["ratio"]["median"] == pytest.approx(float(ratios.quantile(0.5)), rel=1e-5)
    printed = capsys.readouterr().out
    assert "In all about" in printed
    assert "geometric mean of op / plain" in printed


def test_distributed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is sent is what is counted from the shards; two ranks share the state."""
    layouts = ["ddp", "ddp-sharded", "fsdp"]
    arguments = ["--sets", "gpt2", "--ranks", "1", "2", "--layouts", *layouts]
    assert run("distributed", *arguments, *files(tmp_path)) == 0
    records = check_files(tmp_path, 6)["records"]
    by_name = {(r["layout"], r["ranks"]): r for r in records}
    for (layout, ranks), record in by_name.items():
        assert record["bytes"] == record["paper"]
        assert (record["bytes"] > 0) == (layout != "ddp" and ranks == 2)
        assert 0 <= record["exchange"] < 1
    assert by_name["fsdp", 2]["collectives"] == 3
    whole, shared = by_name["ddp", 2]["state"], by_name["fsdp", 2]["state"]
    assert whole / 2 <= shared < 0.7 * whole
    assert "| gpt2, fsdp | 2 |" in capsys.readouterr().out


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in optimizers.DEFAULT_OPTIMIZERS if not optimizers.missing(name)]
    arguments = ["--sets", "gpt2", "moe", "--steps", "3", "--optimizers", *names]
    picture = tmp_path / "out.png"
    assert run("step", *arguments, *files(tmp_path), "--png", str(picture)) == 0
    assert picture.stat().st_size > 0
    records = check_files(tmp_path, 2 * len(names))["records"]
    by_name = {(r["set"], r["optimizer"]): r for r in records}
    for record in records:
        assert len(record["times"]) == 10  # rounded up to a whole period
        baseline = by_name[record["set"], "adamw"]["times"]
        ratio = sum(record["times"]) / sum(baseline)
        assert record["ratio"]["adamw"]["median"] == pytest.approx(ratio)
        sizes = record["state_bytes"]
        assert sizes["total"] == sum(value for key, value in sizes.items() if key != "total")
        assert sizes["other"] < sizes["total"] / 2
        assert record["peak_bytes"] >= sizes["total"] - sizes["other"]
    assert "In all about" in capsys.readouterr().out


def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["dykaf-ksl", "textbook-soap", "adamw"]
    picture = tmp_path / "out.png"
    arguments = ["--optimizers", *names, "--sides", "4", "8", "--counts", "1", "2"]
    assert run("scale", *arguments, *files(tmp_path), "--png", str(picture)) == 0
    assert picture.stat().st_size > 0
    report = check_files(tmp_path, 4 * len(names))
    small, large = (
        next(r["mean"] for r in report["records"] if (r["sweep"], r["at"]) == ("n", n))
        for n in (4, 8)
    )
    exponents = report["settings"]["against n"]["exponents"]
    assert exponents["dykaf-ksl"] == pytest.approx(math.log2(large / small))
    assert "from n = " in (printed := capsys.readouterr().out) or "no curve crosses" in printed


class Interrupt:
    """Raises KeyboardInterrupt in place of the timed call of a given number."""

    def __init__(self, call_idx: int) -> None:
        self.calls_left = call_idx

    def __call__(self, function: Callable[[], object], device: str) -> float:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        return timing.seconds(function, device)


@pytest.mark.parametrize(
    ("arguments", "num_calls", "num_records"),
    [
        # Each row of ops takes a warm-up and five repetitions of its three forms.
        (["ops", "--ops", "grad_max", "rotate into", "--seconds", "0", "--sets", "vit"], 19, 1),
        # Eleven warm-up steps each, then two rounds and a half.
        (["step", "--optimizers", "adamw", "muon", "--sets", "vit"], 2 * 11 + 5, 2),
        (["step", "--optimizers", "adamw", "muon", "--sets", "vit"], 3, 0),
        # The first point takes 11 + 10 steps.
        (["scale", "--optimizers", "adamw"], 22, 1),
    ],
    ids=["ops", "step", "step-in-warm-up", "scale"],
)
def test_an_interrupted_run_reports(
    arguments: list[str],
    num_calls: int,
    num_records: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = "ops" if arguments[0] == "ops" else "step"
    monkeypatch.setattr(f"bench.{module}.seconds", Interrupt(num_calls))
    assert run(*arguments, *files(tmp_path)) == 130
    report = check_files(tmp_path, num_records)
    assert report["interrupted"]
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    if arguments[0] == "step" and num_records:
        assert sorted(r["num_samples"] for r in report["records"]) == [2, 3]
        assert printed.count("(cut)") == 3  # two rows, and the line that explains them
    if not num_records:
        assert "(nothing was measured)" in printed


def test_a_missing_optimizer_is_left_out_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "heavyball", None)
    arguments = ["--sets", "vit", "--steps", "1", "--optimizers", "soap-heavyball"]
    assert run("step", *arguments, "adamw", *files(tmp_path)) == 0
    (note,) = check_files(tmp_path, 1)["notes"]
    assert note.startswith("soap-heavyball: left out, ")
    assert "[bench]" in note
    assert note in capsys.readouterr().out.splitlines()
    assert run("step", *arguments) == 2


def test_a_set_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.step.available_bytes", lambda device: 1000)
    assert run("step", "--sets", "vit", "--optimizers", "adamw", *files(tmp_path)) == 0
    (note,) = check_files(tmp_path, 0)["notes"]
    assert note.startswith("- vit: left out, it needs")


@pytest.mark.parametrize(
    "arguments",
    [
        ["step", "--steps", "0"],
        ["scale", "--sides", "0"],
        ["scale", "--periods", "0"],
        ["step", "--json", "/nonexistent/out.json"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench: --")


def test_heavyball_compiles_only_where_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    heavyball = pytest.importorskip("heavyball")
    modes: list[str] = []

    def record(function: Callable[..., Any], mode: str, **options: Any) -> Callable[..., Any]:
        modes.append(mode)
        return function

    monkeypatch.setattr(heavyball.utils.fusions, "compile", record)
    grads = [grad.float() for grad in random_grads(4, 6, 3)]
    trajectory(lambda params: optimizers.SPECS["soap-heavyball"].make(params, 100), grads)
    assert modes == []
    trajectory(lambda params: optimizers.SPECS["soap-heavyball-compiled"].make(params, 100), grads)
    assert set(modes) == {"max-autotune-no-cudagraphs"}
