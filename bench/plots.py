"""Pictures of the results, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.optimizers import SPECS
from bench.report import Record
from bench.scale import SWEEPS, curves

matplotlib.use("agg")

PROFILE_STEPS = 50
COLORS = dict(zip(SPECS, matplotlib.color_sequences["tab20"], strict=False))


def draw_steps(records: Sequence[Record], path: Path) -> None:
    """Per set: the mean time of a step with the worst one, and the time of each of 50 steps."""
    names = list(dict.fromkeys(record["set"] for record in records))
    figure = Figure(figsize=(13, 3.4 * len(names)), layout="constrained")
    for (bars, profile), name in zip(
        figure.subplots(len(names), 2, squeeze=False), names, strict=True
    ):
        of_set = [record for record in records if record["set"] == name]
        labels = [record["optimizer"] for record in of_set]
        means = [1e3 * record["mean"] for record in of_set]
        bars.barh(labels, means, color=[COLORS[label] for label in labels])
        bars.plot([1e3 * record["worst"] for record in of_set], labels, "k|", markersize=10)
        bars.invert_yaxis()
        bars.set(xscale="log", title=name, xlabel="ms per step: mean, and worst (tick)")
        for record in of_set:
            times = [1e3 * seconds for seconds in record["times"][:PROFILE_STEPS]]
            label = record["optimizer"]
            profile.plot(range(1, len(times) + 1), times, color=COLORS[label], label=label)
        profile.set(yscale="log", xlabel="measured step", ylabel="ms")
        profile.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        plain_ticks(bars.xaxis)
        plain_ticks(profile.yaxis)
        finish(bars, profile)
    figure.savefig(path, dpi=120)


def draw_scale(records: Sequence[Record], path: Path) -> None:
    """Mean time of a step against the side and against the number of matrices."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, sweep in zip(axes, SWEEPS, strict=True):
        found = curves([record for record in records if record["sweep"] == sweep])
        for name, (xs, ys) in found.items():
            axis.plot(xs, [1e3 * y for y in ys], "o-", color=COLORS[name], label=name)
        axis.set(xscale="log", yscale="log", xlabel=f"{sweep}: {SWEEPS[sweep]}")
        plain_ticks(axis.yaxis)
        places = sorted({x for xs, _ in found.values() for x in xs})
        axis.set_xticks(places, labels=[str(x) for x in places])
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("mean ms per step")
    axes[0].legend(fontsize=8, frameon=False)
    finish(*axes)
    figure.savefig(path, dpi=120)


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 ... on a log axis that may not reach over a decade; 1, 10 ... over many."""
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(*axes: Axes) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


Draw = Callable[[Sequence[Record], Path], None]
DRAW: dict[str, Draw] = {"step": draw_steps, "scale": draw_scale}
