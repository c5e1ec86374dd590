"""dykaf.plot: what is recorded, what is drawn, and the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from optim_helpers import parameter, params_of, run, two_sided

from dykaf import DyKAF, plot

pytest.importorskip("matplotlib")

STEPS = range(1, 13)
KEYS = {"Staleness of the bases": "staleness", "Condition of the factors": "condition"}


def named(**options: Any) -> DyKAF:
    params = [("first", parameter(6, 4)), ("second", parameter(5, 3)), ("bias", parameter(4))]
    return two_sided(params, **options)


def recorded(path: Path, optimizer: DyKAF | None = None) -> list[dict[str, Any]]:
    """diagnostics() of each step, as it was told when the step was recorded."""
    optimizer = optimizer or named()
    told = []
    for step in STEPS:
        run(optimizer, range(step, step + 1))
        told.append(optimizer.diagnostics())
        plot.record(optimizer, path, step)
    return told


def panels(path: Path) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in plot._draw_run(plot.load(path)).axes}


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_lines_are_the_diagnostics(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    told = recorded(file)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(STEPS)
    assert [entry["diagnostics"] for entry in entries] == told
    assert plot.load(file) == dict(zip(STEPS, told, strict=True))


def test_bands_are_over_the_parameters(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    told = recorded(file)
    drawn = panels(file)
    for title, key in KEYS.items():
        # The first gradient sets up the factors; they are told from then on.
        rows = [
            [
                max(report[name][f"{key}_L"], report[name][f"{key}_R"])
                for name in ("first", "second")
            ]
            for report in told
        ]
        assert len({tuple(row) for row in rows}) > 5
        found = lines(drawn[title])
        for label, each in (("largest", max), ("median", median), ("smallest", min)):
            assert found[label] == (list(STEPS), [each(row) for row in rows])
        edge = drawn[title].collections[0].get_paths()[0].vertices[:, 1]
        assert edge.max() == max(map(max, rows)) and edge.min() == min(map(min, rows))
        worst = "first" if rows[-1][0] > rows[-1][1] else "second"
        assert drawn[title].get_xlabel() == f"step\nlargest at the end: {worst}"
    rows = [
        [entry["update_rms"] for name, entry in report.items() if name != "optimizer"]
        for report in told
    ]
    assert {len(row) for row in rows} == {3}
    found = lines(drawn["Update before lr"])
    for label, each in (("largest", max), ("median", median), ("smallest", min)):
        assert found[label] == (list(STEPS), [each(row) for row in rows])


def test_what_went_wrong_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    optimizer = named()
    first, second, _ = params_of(optimizer)
    for step in STEPS:
        run(optimizer, range(step, step + 1))
        if step == 5:
            optimizer.state[first]["refresh_fallbacks"] += 2
            optimizer.state[second]["refresh_fallbacks"] += 1
        if step >= 9:
            first.grad.fill_(math.inf)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        plot.record(optimizer, file, step)
    found = lines(panels(file)["What went wrong, in all"])
    assert found["skipped steps"] == (list(STEPS), [0] * 8 + [1, 2, 3, 4])
    assert found["refreshes that failed"] == (list(STEPS), [0] * 4 + [3] * 8)


def test_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    told = recorded(file)
    optimizer = named()
    run(optimizer, range(4))
    plot.record(optimizer, file, 8)
    assert plot.load(file) == {
        **dict(zip(range(1, 8), told[:7], strict=True)),
        8: optimizer.diagnostics(),
    }


def test_infinite_conditions(tmp_path: Path) -> None:
    """Written as null, read as the largest of all, and left out of the picture."""
    file = tmp_path / "run.jsonl"
    optimizer = named()
    run(optimizer, range(3))
    state = optimizer.state[params_of(optimizer)[0]]
    state["L"][0, 0] = 0
    assert optimizer.diagnostics()["first"]["condition_L"] == math.inf
    plot.record(optimizer, file, 1)
    assert json.loads(file.read_text())["diagnostics"]["first"]["condition_L"] is None
    axes = panels(file)["Condition of the factors"]
    assert lines(axes)["largest"] == ([1], [math.inf])
    assert axes.get_xlabel().endswith("first")
    plot.plot_run(file, tmp_path / "run.png")


def test_parameters_without_factors(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    recorded(file, named(max_precond_dim=0))
    drawn = panels(file)
    assert drawn["Staleness of the bases"].texts[0].get_text() == "no parameter has it"
    assert len(lines(drawn["Update before lr"])["median"][0]) == len(STEPS)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("matrix", [0, 2])
def test_spectrum(state_dtype: str, matrix: int, tmp_path: Path) -> None:
    """Of the factor out of its basis, Q L Q^T, which has the same eigenvalues."""
    stack = parameter(3, 6, 4)
    optimizer = two_sided([("stack", stack)], batch_dims=1, state_dtype=state_dtype)
    run(optimizer, range(9))
    figure = plot._draw_spectrum("stack", plot._factors(optimizer, "stack", matrix))
    state = optimizer.state[stack]
    sides = dict(zip("LR", figure.axes, strict=True))
    for side, axes in sides.items():
        factor = state[side][matrix].double()
        Q = torch.linalg.qr(state[f"Q_{side}"][matrix].double()).Q
        eigenvalues = torch.linalg.svdvals(Q @ factor @ Q.T)
        found = lines(axes)
        assert axes.get_title() == f"{side} of stack"
        assert found["eigenvalues"][0] == list(range(1, len(factor) + 1))
        assert found["eigenvalues"][1] == pytest.approx(eigenvalues.tolist(), rel=1e-6, abs=1e-9)
        diagonal = sorted(factor.diagonal().tolist(), reverse=True)
        assert found["diagonal in the basis"][1] == diagonal
    out = tmp_path / "spectrum.svg"
    plot.plot_spectrum(optimizer, "stack", out, matrix)
    assert out.read_text().lstrip().startswith("<?xml")


def test_spectrum_of_one_side() -> None:
    optimizer = DyKAF([("weight", parameter(9, 4))])
    run(optimizer, range(3))
    figure = plot._draw_spectrum("weight", plot._factors(optimizer, "weight", 0))
    assert [axes.get_title() for axes in figure.axes] == ["R of weight"]


def test_spectrum_of_what_has_none(tmp_path: Path) -> None:
    optimizer = named()
    out = tmp_path / "out.png"
    with pytest.raises(ValueError, match="factors on this rank, got 'first'"):
        plot.plot_spectrum(optimizer, "first", out)
    run(optimizer, range(3))
    with pytest.raises(ValueError, match="factors on this rank, got 'bias'"):
        plot.plot_spectrum(optimizer, "bias", out)
    optimizer.state[params_of(optimizer)[0]]["step"] = torch.empty(0)  # another rank's
    with pytest.raises(ValueError, match="factors on this rank, got 'first'"):
        plot.plot_spectrum(optimizer, "first", out)
    with pytest.raises(ValueError, match=r"one of diagnostics.*got 'third'"):
        plot.plot_spectrum(optimizer, "third", out)
    assert not out.exists()


@pytest.mark.parametrize("line", ["not json", "[1]", '{"step": 3}', '{"diagnostics": {}}'])
def test_lines_that_are_none(line: str, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    plot.record(named(), file, 1)
    with file.open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(ValueError, match="line 2: expected a line of record"):
        plot.load(file)


def command(*arguments: str | Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "dykaf.plot"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    recorded(file)
    done = command(file)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'run.png'}\n", "")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    done = command(file, "--out", tmp_path / "other.pdf")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'other.pdf'}\n")
    assert (tmp_path / "other.pdf").read_bytes().startswith(b"%PDF")


def test_what_the_command_refuses(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.touch()
    for file, message in ((missing, "No such file"), (empty, "at least one line")):
        done = command(file)
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.count("\n") == 1 and str(file) in done.stderr
    file = tmp_path / "run.jsonl"
    recorded(file)
    done = command(file, "--out", tmp_path / "picture.nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr


def test_without_matplotlib(tmp_path: Path) -> None:
    """Recording needs none; the command says what to install."""
    file = tmp_path / "run.jsonl"
    recorded(file)
    code = (
        "import sys; sys.modules['matplotlib'] = None; from dykaf import plot; "
        "sys.exit(plot.main(sys.argv[1:]))"
    )
    done = command(file, code=code)
    assert done.returncode == 2
    assert done.stderr == "dykaf.plot: matplotlib is missing: pip install matplotlib\n"
