"""One page and picture of how rates and losses move along an axis: batch, width.

`[axes]` of the grid file names the tasks and sizes of each axis, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.evidence.plots import mark_rates, style_of
from bench.evidence.stats import paired_difference
from bench.evidence.summary import Row, Summary, best_per_rate

TITLE = "Along an axis: does the best learning rate move?"


def axes_page(axes: Mapping[str, Sequence[Summary]], baseline: str) -> str:
    """Tables of each axis, contender by size."""
    parts = [
        f"# {TITLE}",
        "",
        "Each size is tuned on its own, as its page tells. Loss: mean ± standard deviation over "
        f"the seeds. Difference from {baseline}: mean of the pairs of one seed ± half of a 95% "
        "confidence interval (Student's t).",
        "",
    ]
    for name, summaries in axes.items():
        parts += [f"## {name.capitalize()}", "", *axis_tables(summaries, baseline)]
    return "\n".join(parts) + "\n![Loss against learning rate](axes.png)\n"


def axis_tables(summaries: Sequence[Summary], baseline: str) -> list[str]:
    """Settings that differ, selected rates, losses, differences."""
    lines = []
    for summary in summaries:
        settings = ", ".join(f"{key} {value}" for key, value in own_settings(summary, summaries))
        page = f"{summary.task}-{summary.size}.md"
        lines.append(f"- [{label(summary)}]({page}): {settings}")
    tables: dict[str, Callable[[Row, Summary], str]] = {
        "selected lr": lambda row, summary: rate_text(row),
        "loss": lambda row, summary: loss_text(row),
        f"difference from {baseline}": lambda row, summary: difference(row, summary, baseline),
    }
    contenders = dict.fromkeys(row.contender for summary in summaries for row in summary.rows)
    for title, text in tables.items():
        heads = [title, *(label(summary) for summary in summaries)]
        lines += ["", line(heads), line(["---", *["---:"] * len(summaries)])]
        for contender in contenders:
            cells = [find(summary, contender) for summary in summaries]
            texts = [
                text(row, summary) if row else ""
                for row, summary in zip(cells, summaries, strict=True)
            ]
            lines.append(line([contender, *texts]))
    return [*lines, ""]


def own_settings(summary: Summary, summaries: Sequence[Summary]) -> list[tuple[str, Any]]:
    """Settings that are not the same in all sizes of an axis."""
    return [
        (key, value)
        for key, value in summary.table["settings"].items()
        if any(other.table["settings"].get(key) != value for other in summaries)
    ]


def label(summary: Summary) -> str:
    return f"{summary.task}/{summary.size}"


def find(summary: Summary, contender: str) -> Row | None:
    return next((row for row in summary.rows if row.contender == contender), None)


def rate_text(row: Row) -> str:
    if row.best is None:
        return "none finished" if row.is_tuned else "not tuned yet"
    return f"{row.best.lr:g}" + (" (edge)" if "lr" in row.edges else "")


def loss_text(row: Row) -> str:
    if not row.losses:
        return ""
    spread = "" if row.deviation is None else f" ± {row.deviation:.4f}"
    return f"{row.mean:.4f}{spread}"


def difference(row: Row, summary: Summary, baseline: str) -> str:
    """In bold if its interval leaves out zero."""
    base = find(summary, baseline)
    if base is None or base is row:
        return ""
    found = paired_difference(row.losses, base.losses)
    if found is None:
        return ""
    return f"**{found}**" if found.is_clear else str(found)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_axes(axes: Mapping[str, Sequence[Summary]], path: Path) -> None:
    """Tuning loss against learning rate: a row per axis, a panel per size."""
    width = max(len(summaries) for summaries in axes.values())
    figure = Figure(figsize=(4.2 * width, 3.6 * len(axes) + 0.8), layout="constrained")
    panels = figure.subplots(len(axes), width, squeeze=False)
    summaries = [summary for group in axes.values() for summary in group]
    contenders = sorted({row.contender for summary in summaries for row in summary.rows})
    styles = {contender: style_of(idx) for idx, contender in enumerate(contenders)}
    handles: dict[str, Any] = {}
    for row_of_panels, group in zip(panels, axes.values(), strict=True):
        for panel in row_of_panels[len(group) :]:
            panel.set_axis_off()
        for panel, summary in zip(row_of_panels, group, strict=False):
            for row in summary.rows:
                losses = best_per_rate(row)
                x, y = list(losses), list(losses.values())
                (curve,) = panel.plot(x, y, marker=".", **styles[row.contender])
                handles.setdefault(row.contender, curve)
                if row.best is not None:
                    panel.plot(row.best.lr, losses[row.best.lr], "o", color=curve.get_color())
            panel.set_title(label(summary))
            panel.set_xlabel("peak learning rate (tuning; dot: selected)")
            mark_rates(panel, summary.table["lrs"])
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        row_of_panels[0].set_ylabel("loss")
    figure.legend(
        [handles[name] for name in contenders],
        contenders,
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
