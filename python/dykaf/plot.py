"""Pictures of how a run fares: ``python -m dykaf.plot run.jsonl [--out picture.png]``.

:func:`record` appends what :meth:`dykaf.DyKAF.diagnostics` says to a file, one JSON object a line;
:func:`plot_run` draws such a file, :func:`plot_spectrum` the factors of one parameter. The two need
matplotlib: ``pip install matplotlib``, or dykaf's extra ``plot``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from dykaf.checks import param_name
from dykaf.state import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dykaf.optimizer import DyKAF

Report = dict[str, dict[str, Any]]

_SIDES = {"L": "#0072b2", "R": "#d55e00"}
_BAND = "#0072b2"


def record(optimizer: DyKAF, path: str | PathLike[str], step: int) -> None:
    """Appends one line, ``{"step": ..., "diagnostics": {...}}``, to a file.

    Numbers that are not finite are written as null, which plain JSON has.

    Args:
        optimizer: after a step.
        path: of the file, which is made where it is missing; with many processes one file each, or
            that of one of them.
        step: of the run, as the training loop counts.
    """
    line = {"step": step, "diagnostics": _finite(optimizer.diagnostics())}
    with Path(path).open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: str | PathLike[str]) -> dict[int, Report]:
    """Reads a file that :func:`record` wrote.

    Args:
        path: of the file.

    Returns:
        diagnostics by step, ascending. Where a run was resumed, the lines of the steps that it took
        again are those of the last time.

    Raises:
        ValueError: naming the line that is not one of :func:`record`, or if there is none.
    """
    reports: dict[int, Report] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            step, report = int(entry["step"]), dict(entry["diagnostics"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a line of record()") from error
        reports = {earlier: value for earlier, value in reports.items() if earlier < step}
        reports[step] = report
    if not reports:
        raise ValueError(f"{path}: expected at least one line of record(), got none")
    return reports


def _values(report: Report, keys: Iterable[str]) -> dict[str, float]:
    """The largest of ``keys`` of each parameter that has one of them; null was not finite."""
    found: dict[str, float] = {}
    for name, entries in report.items():
        values = [entries[key] for key in keys if key in entries]
        if values:
            found[name] = max(math.inf if value is None else float(value) for value in values)
    return found


def _draw_band(axes: Axes, reports: Mapping[int, Report], keys: Iterable[str]) -> None:
    """Median, smallest and largest over the parameters, and whose the largest is at the end."""
    keys = tuple(keys)
    by_step = {step: _values(report, keys) for step, report in reports.items()}
    steps = [step for step, values in by_step.items() if values]
    if not steps:
        axes.text(0.5, 0.5, "no parameter has it", transform=axes.transAxes, ha="center")
        return
    values = [by_step[step].values() for step in steps]
    low, middle, high = ([each(row) for row in values] for each in (min, median, max))
    mark = "o" if len(steps) == 1 else None
    axes.fill_between(steps, low, high, color=_BAND, alpha=0.15, linewidth=0)
    axes.plot(steps, high, color=_BAND, linewidth=0.8, label="largest", marker=mark)
    axes.plot(steps, middle, color=_BAND, linewidth=2, label="median", marker=mark)
    axes.plot(steps, low, color=_BAND, linewidth=0.8, label="smallest", marker=mark)
    last = by_step[steps[-1]]
    worst = max(last, key=lambda name: last[name])
    axes.set_xlabel(f"step\nlargest at the end: {_shortened(worst)}", fontsize=9)


def _shortened(name: str) -> str:
    return name if len(name) <= 48 else "..." + name[-45:]


def _draw_counts(axes: Axes, reports: Mapping[int, Report]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = list(reports)
    skipped = [reports[step]["optimizer"]["skipped_steps"] for step in steps]
    fallbacks = [
        sum(entries.get("refresh_fallbacks", 0) for entries in reports[step].values())
        for step in steps
    ]
    for counts, label, color in (
        (skipped, "skipped steps", "#d55e00"),
        (fallbacks, "refreshes that failed", "#009e73"),
    ):
        axes.plot(steps, counts, color=color, label=label, drawstyle="steps-post")
    most = max(1, *skipped, *fallbacks)
    axes.set_ylim(-0.05 * most, 1.1 * most)  # a line at 0 is seen
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def plot_run(path: str | PathLike[str], out: str | PathLike[str]) -> None:
    """Draws how staleness, condition and update RMS of the parameters go over the steps.

    The bands reach from the smallest to the largest over the parameters, the thick line is their
    median; of a parameter with two factors the larger counts. Infinite conditions are not drawn.

    Args:
        path: of a file that :func:`record` wrote.
        out: of the picture; its suffix says in which format.

    Raises:
        ValueError: as :func:`load`.
    """
    _draw_run(load(path)).savefig(out, dpi=120)


def _draw_run(reports: Mapping[int, Report]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (staleness, condition), (update, counts) = figure.subplots(2, 2, sharex=True)
    _draw_band(staleness, reports, ("staleness_L", "staleness_R"))
    staleness.set(title="Staleness of the bases", ylabel="off-diagonal share", ylim=(0, None))
    _draw_band(condition, reports, ("condition_L", "condition_R"))
    condition.set(title="Condition of the factors", ylabel="largest / smallest", yscale="log")
    _draw_band(update, reports, ("update_rms",))
    update.set(title="Update before lr", ylabel="root mean square", ylim=(0, None))
    _draw_counts(counts, reports)
    counts.set(title="What went wrong, in all", ylabel="count")
    handles, labels = staleness.get_legend_handles_labels()
    if handles:
        staleness.legend(handles, labels, frameon=False, fontsize=8)
    for axes in (staleness, condition, update, counts):
        axes.tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def plot_spectrum(optimizer: DyKAF, name: str, out: str | PathLike[str], matrix: int = 0) -> None:
    """Draws the eigenvalues of a parameter's factors, and the diagonals that stand for them.

    The diagonal of a factor in its basis is what the basis takes for eigenvalues: where the two
    curves part, the basis is stale.

    Args:
        optimizer: after the first step of the parameter.
        name: of the parameter, as in :meth:`dykaf.DyKAF.diagnostics`.
        out: of the picture; its suffix says in which format.
        matrix: which matrix of a stack (``batch_dims``).

    Raises:
        ValueError: for a name that no parameter has, and for a parameter without factors here.

    The eigenvalues of a side of n cost n^3 operations in float64 on the CPU.
    """
    _draw_spectrum(name, _factors(optimizer, name, matrix)).savefig(out, dpi=120)


def _draw_spectrum(name: str, factors: Mapping[str, torch.Tensor]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(factors), 4), layout="constrained")
    for axes, (side, factor) in zip(
        figure.subplots(1, len(factors), squeeze=False)[0], factors.items(), strict=True
    ):
        factor = factor.detach().cpu().double()
        eigenvalues = torch.linalg.eigvalsh(factor).flip(0)
        diagonal = factor.diagonal().sort(descending=True).values
        places = range(1, len(diagonal) + 1)
        color = _SIDES[side]
        axes.plot(places, _positive(eigenvalues), color=color, label="eigenvalues")
        axes.plot(
            places,
            _positive(diagonal),
            color="black",
            linestyle="--",
            label="diagonal in the basis",
        )
        axes.set(title=f"{side} of {_shortened(name)}", yscale="log")
        axes.set(xlabel="eigenvalue, largest first", ylabel="size (the factor has norm 1)")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _positive(values: torch.Tensor) -> list[float]:
    """For a logarithmic axis: what rounding made zero or negative is left out."""
    return [value if value > 0 else math.nan for value in values.tolist()]


def _factors(optimizer: DyKAF, name: str, matrix: int) -> dict[str, torch.Tensor]:
    for group_idx, group in enumerate(optimizer.param_groups):
        for idx, param in enumerate(group["params"]):
            if param_name(group, group_idx, idx) != name:
                continue
            state = optimizer.state.get(param)
            if state and state["step"].numel() > 0:
                found = list(matrices(state))[matrix]
                factors = {side: found[side] for side in _SIDES if side in found}
                if factors and float(found["rho"][0]) > 0:
                    return factors
            raise ValueError(f"name: expected a parameter with factors on this rank, got {name!r}")
    raise ValueError(f"name: expected one of diagnostics(), got {name!r}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dykaf.plot", description="Draws the file that dykaf.plot.record wrote."
    )
    parser.add_argument("file", type=Path, help="JSON lines, one a step")
    parser.add_argument(
        "--out", type=Path, help="the picture, .png, .pdf or .svg; default: FILE with .png"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.file.with_suffix(".png")
    try:
        plot_run(options.file, out)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("dykaf.plot: matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"dykaf.plot: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
