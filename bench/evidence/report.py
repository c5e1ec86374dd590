"""Markdown tables, pictures and JSON of all results, written from the JSONL files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.evidence.fisher_report import fisher_page
from bench.evidence.plots import draw_fisher, draw_training
from bench.evidence.records import keep_records, kept_path, known_records
from bench.evidence.summary import Row, Summary, best_per_rate, current_records, summarise

TITLES = {
    "shakespeare": "Byte language model, Shakespeare",
    "stdlib": "Byte language model, Python's standard library",
    "lora": "LoRA fine-tuning of all-MiniLM-L6-v2, movie reviews",
    "vision": "Convolutional network, 5,000 images of MNIST",
    "digits": "Softmax regression, digits: gap to the optimum",
    "fisher": "Kronecker factors against the explicit Fisher matrix",
}
MEASURES = {
    "shakespeare": "held-out nats per byte",
    "stdlib": "held-out nats per byte",
    "lora": "held-out cross-entropy, nats",
    "vision": "held-out cross-entropy, nats",
    "digits": "log10 of the gap to the optimum (-8: to the accuracy of the optimum)",
}

# digits has no held-out data: its seeds are starting points.
HELD_OUT = {True: ", scored on held-out data that tuning did not see", False: ""}


def write_report(
    out: Path, docs: Path, grid: Mapping[str, Any], tasks: Sequence[str], sizes: Sequence[str]
) -> int:
    """Write a page and a picture for each task and size with results, and the list of them.

    Returns:
        0; 2 if there are no results.
    """
    docs.mkdir(parents=True, exist_ok=True)
    num_pages = 0
    for task in tasks:
        for size in grid["tasks"][task]:
            if size not in sizes:
                continue
            records = list(known_records(out, docs, task, size).values())
            if not records:
                continue
            keep_records(kept_path(docs, task, size), records)
            page = write_page(task, size, records, docs, grid)
            num_pages += 1
            print(page)
    if num_pages == 0:
        print(f"no results in {out}; python -m bench.evidence makes them")
        return 2
    write_index(docs)
    return 0


def write_page(
    task: str, size: str, records: list[dict[str, Any]], docs: Path, grid: Mapping[str, Any]
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
        summary = summarise(task, size, records, grid)
        text = head + training_page(summary)
        draw_training(summary, MEASURES[task], docs / f"{name}.png")
        rows = [json_row(row) for row in summary.rows]
        (docs / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    path = docs / f"{name}.md"
    path.write_text(f"{text}\n{picture}")
    return path


def write_index(docs: Path) -> None:
    """docs/evidence/README.md: the pages that are there."""
    pages = sorted(path for path in docs.glob("*.md") if path.name != "README.md")
    lines = [f"- [{path.read_text().splitlines()[0][2:]}]({path.name})" for path in pages]
    (docs / "README.md").write_text(
        "# Evidence\n\nWritten by `python -m bench.evidence report`; "
        "[bench/evidence/README.md](../../bench/evidence/README.md) says what is compared and "
        "how.\n\n" + "\n".join(lines) + "\n"
    )


def training_page(summary: Summary) -> str:
    """Protocol in two sentences, the two tables, notes."""
    table = summary.table
    held_out = HELD_OUT[summary.task != "digits"]
    settings = ", ".join(f"{key} {value}" for key, value in table["settings"].items())
    if "steps" in table:
        own = ", ".join(f"{name} {steps}" for name, steps in table["steps"].items())
        settings += f"; steps for equal time: {own}"
    return "\n".join(
        [
            f"{MEASURES[summary.task].capitalize()}, lower is better. Each contender got "
            f"{len(table['lrs'])} learning rates x {len(table['warmups'])} warm-ups on "
            f"{summary.num_tuning_seeds} tuning seed(s); the best of them ran on "
            f"{len(table['seeds'])} fresh seeds{held_out}. "
            "± is half a 95% confidence interval of the mean difference between runs of the same "
            "seed (Student's t).",
            "",
            *result_table(summary),
            "",
            "## Every learning rate tried (tuning, best warm-up)",
            "",
            *rate_table(summary),
            "",
            f"Settings: {settings}. Data sha256 `{summary.data_sha256[:16]}`.",
            *(f"\n{note}" for note in summary.notes),
            "",
        ]
    )


def result_table(summary: Summary) -> list[str]:
    has_error = any(
        "error" in r["final"] for row in summary.rows for r in row.reports if r["final"]
    )
    titles = ["contender", "lr", "warm-up", "seeds", "mean", "sd"]
    titles += ["errors"] if has_error else []
    titles += [f"- {name}" for name in summary.baselines]
    titles += ["diverged: tuning, reported", "core s", "in optimizer"]
    lines = [line(titles), line(["---", *["---:"] * (len(titles) - 1)])]
    for row in summary.rows:
        cells = [row.contender]
        if row.best is None:
            cells += ["none finished"] + [""] * (len(titles) - 2)
            lines.append(line(cells))
            continue
        cells += [
            f"{row.best[name]:g}" + (" (edge)" if name in row.edges else "")
            for name in ("lr", "warmup")
        ]
        cells.append(str(len(row.reports)))
        cells += [f"{row.mean:.4f}" if row.losses else "", sd_text(row)]
        if has_error:
            cells.append(f"{row.mean_of(lambda r: r['final']['error']):.2%}" if row.losses else "")
        cells += [difference_text(row, name) for name in summary.baselines]
        cells.append(
            f"{row.num_diverged(row.tuning)} of {len(row.tuning)}, "
            f"{row.num_diverged(row.reports)} of {len(row.reports)}"
        )
        if row.losses:
            seconds = row.mean_of(lambda r: r["cpu_seconds"])
            share = row.mean_of(lambda r: r["optimizer_cpu_seconds"]) / seconds
            cells += [f"{seconds:.1f}", f"{share:.0%}"]
        else:
            cells += ["", ""]
        lines.append(line(cells))
    return lines


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


def rate_table(summary: Summary) -> list[str]:
    """Means over the tuning seeds; "div." where they diverged at every warm-up."""
    lrs = summary.table["lrs"]
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
    return lines


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def json_row(row: Row) -> dict[str, Any]:
    """The numbers of a table row."""
    return {
        "contender": row.contender,
        "lr": row.best and row.best["lr"],
        "warmup": row.best and row.best["warmup"],
        "edges": row.edges,
        "losses": row.losses,
        "differences": {
            name: difference and vars(difference) for name, difference in row.differences.items()
        },
        "num_tuning": len(row.tuning),
        "num_tuning_diverged": row.num_diverged(row.tuning),
        "num_reports_diverged": row.num_diverged(row.reports),
    }
