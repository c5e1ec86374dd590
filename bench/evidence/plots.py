"""The pictures of the report."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.evidence.summary import Summary, best_per_rate

matplotlib.use("agg")

Record = dict[str, Any]
STYLES = ("-", "--", ":")
NUM_COLORS = 10
SHOWN_RANGE = 1.0  # losses further above the best are cut off; what matters is near the end


def style_of(idx: int) -> dict[str, Any]:
    """Ten colours, then the same with other line styles."""
    return {"color": f"C{idx % NUM_COLORS}", "linestyle": STYLES[idx // NUM_COLORS % len(STYLES)]}


def mean_curve(reports: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Means of `key` and of the loss over the seeds, per measured step that all seeds reached."""
    points: dict[int, list[Record]] = defaultdict(list)
    for record in reports:
        for point in record["curve"]:
            points[point["step"]].append(point)
    whole = [group for _, group in sorted(points.items()) if len(group) == len(reports)]
    return (
        [statistics.fmean(point[key] for point in group) for group in whole],
        [statistics.fmean(point["loss"] for point in group) for group in whole],
    )


def draw_training(summary: Summary, measure: str, path: Path) -> None:
    """Loss over steps, over core seconds, and over the learning rates tried, if any were."""
    is_tuned_here = "tuned_by" not in summary.table
    num_panels = 3 if is_tuned_here else 2
    figure = Figure(figsize=(5 * num_panels, 5.6), layout="constrained")
    axes = figure.subplots(1, num_panels)
    lowest = []
    for idx, row in enumerate(sorted(summary.rows, key=lambda row: row.contender)):
        style = style_of(idx)
        label = row.contender + (f", lr {row.best.lr:g}" if row.best else "")
        reports = [record for record in row.reports if not record["diverged"]]
        for axis, key in zip(axes, ("step", "cpu_seconds"), strict=False):
            x, y = mean_curve(reports, key)
            axis.plot(x, y, label=label, **style)
            lowest += y
        losses = best_per_rate(row)
        if is_tuned_here:
            axes[2].plot(list(losses), list(losses.values()), marker=".", **style)
        lowest += losses.values() if not reports else []
    for axis, title in zip(
        axes,
        (
            "steps",
            "seconds of one core, evaluation not counted",
            "peak learning rate (tuning)",
        ),
        strict=False,
    ):
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if summary.is_log:
            axis.set_yscale("log")
        elif lowest:
            axis.set_ylim(min(lowest) - 0.03, min(lowest) + SHOWN_RANGE)
    if is_tuned_here:
        mark_rates(axes[2], summary.table["lrs"])
    axes[0].set_ylabel("gap to the optimum" if summary.is_log else measure)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def mark_rates(axis: Any, lrs: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.minorticks_off()  # its labels would run into each other
    axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs])


def draw_fisher(records: Sequence[Record], path: Path) -> None:
    """Error over steps: a row per problem and beta; in-sample left, next-step right."""
    groups: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["contender"], record["options"]["beta"]].append(record)
    figure = Figure(figsize=(12, 3.6 * len(groups) + 0.8), layout="constrained")
    all_axes = figure.subplots(len(groups), 2, squeeze=False)
    for axes, ((problem, beta), group) in zip(all_axes, sorted(groups.items()), strict=True):
        for axis, target in zip(axes, ("in-sample", "next-step"), strict=True):
            draw_errors(axis, group, target)
            axis.set_title(f"{problem}, beta {beta:g}, {target}")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def draw_errors(axis: Any, group: Sequence[Record], target: str) -> None:
    """Mean over the streams, after the best multiple."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in group:
        for point in record["points"]:
            if point["target"] == target:
                values[point["method"]][point["step"]].append(point["scaled"])
    for idx, (method, by_step) in enumerate(values.items()):
        steps = sorted(by_step)
        means = [statistics.fmean(by_step[step]) for step in steps]
        axis.plot(steps, means, label=method, **style_of(idx))
    axis.set_xlabel("steps")
    axis.set_ylabel("error / best Kronecker error")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
