"""Markdown tables, pictures and JSON of all results, written from the JSONL files."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.evidence.axes import axes_page, draw_axes
from bench.evidence.fisher_report import fisher_page
from bench.evidence.plots import draw_fisher, draw_training
from bench.evidence.records import keep_records, kept_path, known_records
from bench.evidence.summary import Row, Summary, best_per_rate, current_records, summarise

TITLES = {
    "shakespeare": "Byte language model, Shakespeare",
    "stdlib": "Byte language model, Python's standard library",
    "bible": "Byte language model, King James Bible",
    "lora": "LoRA fine-tuning of all-MiniLM-L6-v2, movie reviews",
    "vision": "Convolutional network, 5,000 images of MNIST",
    "digits": "Softmax regression, digits: gap to the optimum",
    "fisher": "Kronecker factors against the explicit Fisher matrix",
}
MEASURES = {
    "shakespeare": "held-out nats per byte",
    "stdlib": "held-out nats per byte",
    "bible": "held-out nats per byte",
    "lora": "held-out cross-entropy, nats",
    "vision": "held-out cross-entropy, nats",
    "digits": "log10 of the gap to the optimum (-8: to the accuracy of the optimum)",
}

# digits has no held-out data: its seeds are starting points.
REST = "rest: rate of embeddings, head and vectors over that of the matrices."
HELD_OUT = {True: ", scored on held-out data that tuning did not see", False: ""}


def write_report(
    out: Path, docs: Path, grid: Mapping[str, Any], tasks: Sequence[str], sizes: Sequence[str]
) -> int:
    """Write a page and a picture for each task and size with results, and the list of them.

    Args:
        out: folder of the results.
        docs: folder of the pages.
        grid: what load_grid returned.
        tasks: names of the tasks.
        sizes: names of sizes, or patterns of them.

    Returns:
        0; 2 if there are no results.
    """
    docs.mkdir(parents=True, exist_ok=True)
    written = set()
    for task in tasks:
        for size in grid["tasks"][task]:
            if not any(fnmatch.fnmatchcase(size, pattern) for pattern in sizes):
                continue
            records = list(known_records(out, docs, task, size).values())
            if not records:
                continue
            keep_records(kept_path(docs, task, size), records)
            page = write_page(task, size, records, out, docs, grid)
            written.add(f"{task}/{size}")
            print(page)
    if not written:
        print(f"no results in {out}; python -m bench.evidence makes them")
        return 2
    if any(written & set(members) for members in grid.get("axes", {}).values()):
        write_axes(out, docs, grid)
    write_index(docs)
    return 0


def summary_of(
    task: str,
    size: str,
    records: Sequence[dict[str, Any]],
    out: Path,
    docs: Path,
    grid: Mapping[str, Any],
) -> Summary:
    """With the records of the size that it is tuned by, where there is one."""
    tuner = grid["tasks"][task][size].get("tuned_by")
    tuned_by = known_records(out, docs, *tuner.split("/")).values() if tuner else ()
    return summarise(task, size, records, grid, list(tuned_by))


def write_page(
    task: str,
    size: str,
    records: list[dict[str, Any]],
    out: Path,
    docs: Path,
    grid: Mapping[str, Any],
) -> Path:
    name = f"{task}-{size}"
    head = f"# {TITLES[task]} ({size})\n\n"
    picture = f"![{TITLES[task]}]({name}.png)\n"
    if task == "fisher":
        table = grid["tasks"][task][size]
        kept, notes = current_records(records, table, grid)
        text = head + fisher_page(kept, table) + "".join(f"\n{note}\n" for note in notes)
        draw_fisher(kept, docs / f"{name}.png")
    else:
        summary = summary_of(task, size, records, out, docs, grid)
        text = head + training_page(summary)
        draw_training(summary, MEASURES[task], docs / f"{name}.png")
        rows = [json_row(row) for row in summary.rows]
        (docs / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    path = docs / f"{name}.md"
    path.write_text(f"{text}\n{picture}")
    return path


def write_axes(out: Path, docs: Path, grid: Mapping[str, Any]) -> None:
    """The page of the axes with two sizes or more that have records."""
    axes = {}
    for name, members in grid["axes"].items():
        summaries = []
        for task, size in (member.split("/") for member in members):
            records = list(known_records(out, docs, task, size).values())
            if records:
                summaries.append(summarise(task, size, records, grid))
        if len(summaries) > 1:
            axes[name] = summaries
    if axes:
        draw_axes(axes, docs / "axes.png")
        path = docs / "axes.md"
        path.write_text(axes_page(axes, grid["baselines"][0]))
        print(path)


def write_index(docs: Path) -> None:
    """docs/evidence/README.md: the pages that are there."""
    pages = sorted(path for path in docs.glob("*.md") if path.name != "README.md")
    lines = [f"- [{path.read_text().splitlines()[0][2:]}]({path.name})" for path in pages]
    (docs / "README.md").write_text(
        "# Evidence\n\nWritten by `python -m bench.evidence report`; "
        "[bench/evidence/README.md](../../bench/evidence/README.md) says what is compared and "
        "how.\n\n" + "\n".join(lines) + "\n"
    )


# Lists of the grid file, as the protocol names them.
LISTS = {"lrs": "learning rates", "rest_ratios": "rates of the rest", "warmups": "warm-ups"}


def protocol(summary: Summary) -> str:
    """How the points that ran were found, and on how many seeds they ran."""
    table = summary.table
    runs = f"ran on {len(table['seeds'])} fresh seeds{HELD_OUT[summary.task != 'digits']}. "
    if "tuned_by" in table:
        page = table["tuned_by"].replace("/", "-")
        point = f"the point selected in [{table['tuned_by']}]({page}.md)"
        return f"Nothing is tuned here: of each contender, {point} {runs}"
    counts = {name: f"{len(table[name])} {text}" for name, text in LISTS.items() if name in table}
    seeds = f"on {summary.num_tuning_seeds} tuning seed(s)"
    if "search" not in table:
        return f"Each contender got {' x '.join(counts.values())} {seeds}; the best of them {runs}"
    stages = ", then ".join(" x ".join(counts[name] for name in s) for s in table["search"])
    return (
        f"Each contender was tuned in stages, each at the best point so far: {stages}, {seeds}; "
        f"the best of them {runs}"
    )


def training_page(summary: Summary) -> str:
    """Protocol in a few sentences, the two tables, notes."""
    table = summary.table
    settings = ", ".join(f"{key} {value}" for key, value in table["settings"].items())
    if "steps" in table:
        own = ", ".join(f"{name} {steps}" for name, steps in table["steps"].items())
        settings += f"; steps for equal time: {own}"
    return "\n".join(
        [
            f"{MEASURES[summary.task].capitalize()}, lower is better. {protocol(summary)}"
            "± is half a 95% confidence interval of the mean difference between runs of the same "
            "seed (Student's t).",
            *(["", REST] if "rest_ratios" in summary.tuning_table else []),
            "",
            *result_table(summary),
            "",
            *([] if "tuned_by" in table else rate_section(summary)),
            f"Settings: {settings}. Data sha256 `{summary.data_sha256[:16]}`.",
            *(f"\n{note}" for note in summary.notes),
            "",
        ]
    )


def result_table(summary: Summary) -> list[str]:
    has_error = any(
        "error" in r["final"] for row in summary.rows for r in row.reports if r["final"]
    )
    is_tuned_here = "tuned_by" not in summary.table
    fields = {"lr": "lr", "rest_ratio": "rest", "warmup": "warm-up"}
    if "rest_ratios" not in summary.tuning_table:
        del fields["rest_ratio"]
    titles = ["contender", *fields.values(), "seeds", "mean", "sd"]
    titles += ["errors"] if has_error else []
    titles += [f"- {name}" for name in summary.baselines]
    titles += ["diverged: tuning, reported" if is_tuned_here else "diverged"]
    titles += ["core s", "in optimizer"]
    lines = [line(titles), line(["---", *["---:"] * (len(titles) - 1)])]
    for row in summary.rows:
        cells = [row.contender]
        if row.best is None:
            cells.append("none finished" if row.is_tuned else "not tuned yet")
            cells += [""] * (len(titles) - 2)
            lines.append(line(cells))
            continue
        cells += [field_text(row, name) for name in fields]
        cells.append(str(len(row.reports)))
        cells += [f"{row.mean:.4f}" if row.losses else "", sd_text(row)]
        if has_error:
            cells.append(f"{row.mean_of(lambda r: r['final']['error']):.2%}" if row.losses else "")
        cells += [difference_text(row, name) for name in summary.baselines]
        parts = [row.tuning, row.reports] if is_tuned_here else [row.reports]
        cells.append(", ".join(f"{row.num_diverged(part)} of {len(part)}" for part in parts))
        if row.losses:
            seconds = row.mean_of(lambda r: r["cpu_seconds"])
            share = row.mean_of(lambda r: r["optimizer_cpu_seconds"]) / seconds
            cells += [f"{seconds:.1f}", f"{share:.0%}"]
        else:
            cells += ["", ""]
        lines.append(line(cells))
    return lines


def field_text(row: Row, name: str) -> str:
    """A field of the selected point; a rate that the contender itself gives to the rest."""
    value = getattr(row.best, name)
    if value is None:
        return f"lr {row.options['rest_lr']:g}"
    return f"{value:g}" + (" (edge)" if name in row.edges else "")


def difference_text(row: Row, baseline: str) -> str:
    """A difference in bold if its interval leaves out zero; its pairs, if seeds are left out."""
    difference = row.differences.get(baseline)
    if difference is None:
        return ""
    text = f"**{difference}**" if difference.is_clear else str(difference)
    is_part = 1 < difference.num_pairs < len(row.reports)
    return f"{text} ({difference.num_pairs} pairs)" if is_part else text


def sd_text(row: Row) -> str:
    return "" if row.deviation is None else f"{row.deviation:.4f}"


def rate_section(summary: Summary) -> list[str]:
    """Means over the tuning seeds; "div." where they diverged wherever the rate was tried."""
    lrs = summary.table["lrs"]
    has_ratios = "rest_ratios" in summary.table
    others = "best warm-up and rate of the rest" if has_ratios else "best warm-up"
    lines = [line(["contender", *(f"{lr:g}" for lr in lrs)]), line(["---", *["---:"] * len(lrs)])]
    form = ".1e" if summary.is_log else ".4f"
    for row in summary.rows:
        cells = [row.contender]
        losses = best_per_rate(row)
        tried = {record["lr"] for record in row.tuning}
        for lr in lrs:
            without = "div." if lr in tried else ""
            cells.append(format(losses[lr], form) if lr in losses else without)
        lines.append(line(cells))
    return [f"## Every learning rate tried (tuning, {others})", "", *lines, ""]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def json_row(row: Row) -> dict[str, Any]:
    """The numbers of a table row."""
    ratio = {}
    if row.best is not None and row.best.rest_ratio is not None:
        ratio["rest_ratio"] = row.best.rest_ratio
    return {
        "contender": row.contender,
        "lr": row.best and row.best.lr,
        "warmup": row.best and row.best.warmup,
        **ratio,
        "edges": row.edges,
        "losses": row.losses,
        "differences": {
            name: difference and vars(difference) for name, difference in row.differences.items()
        },
        "num_tuning": len(row.tuning),
        "num_tuning_diverged": row.num_diverged(row.tuning),
        "num_reports_diverged": row.num_diverged(row.reports),
    }
