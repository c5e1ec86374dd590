"""What the records of one task say: selected rates, reported losses, paired differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.evidence.grid import baselines_of, settings_of, tuning_seeds_of, tuning_table
from bench.evidence.search import (
    Point,
    Search,
    axes_of,
    edges,
    point_of,
    search,
    tuning_means,
)
from bench.evidence.stats import Difference, paired_difference

Record = dict[str, Any]
# Gaps that span orders of magnitude are averaged and subtracted as logarithms.
LOG_TASKS = frozenset({"digits"})


@dataclass
class Row:
    """One contender."""

    contender: str
    options: Mapping[str, Any]
    tuning: list[Record]  # that the search asked for; none where another size tunes
    is_tuned: bool
    best: Point | None  # None where tuning is not complete, or all diverged
    reports: list[Record]  # at the selected point
    edges: list[str] = field(default_factory=list)  # as search.edges has them
    losses: dict[int, float] = field(default_factory=dict)  # by seed; diverged ones left out
    differences: dict[str, Difference | None] = field(default_factory=dict)  # by baseline

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values()) if self.losses else math.inf

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    def num_diverged(self, records: Sequence[Record]) -> int:
        return sum(record["diverged"] for record in records)

    def mean_of(self, read: Callable[[Record], float]) -> float:
        """Mean of a number over the reported runs that did not diverge."""
        return statistics.fmean(read(record) for record in self.reports if not record["diverged"])


@dataclass
class Summary:
    """One task in one size."""

    task: str
    size: str
    table: Mapping[str, Any]
    tuning_table: Mapping[str, Any]  # of the size that tunes: this one, or that of `tuned_by`
    rows: list[Row]  # best first
    baselines: list[str]
    num_tuning_seeds: int
    data_sha256: str
    notes: list[str]

    @property
    def is_log(self) -> bool:
        return self.task in LOG_TASKS


def is_planned(record: Record, table: Mapping[str, Any], grid: Mapping[str, Any]) -> bool:
    """Whether the grid file asks for such a run."""
    if record["settings"] != settings_of(table, record["contender"]):
        return False
    if record["task"] == "fisher":
        return True
    options = grid["contenders"].get(record["contender"])
    if options is None or (record["role"] == "tune" and "tuned_by" in table):
        return False
    seeds = tuning_seeds_of(grid, table) if record["role"] == "tune" else table["seeds"]
    point = point_of(record)
    axes = axes_of(tuning_table(grid, table), options)
    return (
        record["options"] == point.options(options)
        and point.lr in axes["lrs"]
        and point.warmup in axes["warmups"]
        and point.rest_ratio in axes["rest_ratios"]
        and record["seed"] in seeds
    )


def current_records(
    records: Sequence[Record], table: Mapping[str, Any], grid: Mapping[str, Any]
) -> tuple[list[Record], list[str]]:
    """Records that the grid file still describes, all on the same data; and what to tell of it."""
    notes = []
    kept = [record for record in records if is_planned(record, table, grid)]
    counts = Counter(record["data_sha256"] for record in kept)
    if counts:
        data = counts.most_common(1)[0][0]
        kept = [record for record in kept if record["data_sha256"] == data]
    if len(kept) < len(records):
        notes.append(
            f"{len(records) - len(kept)} records of another grid file or other data are left out."
        )
    for name, what in (
        ("dykaf_sha256", "states of the package dykaf"),
        ("torch", "versions of torch"),
        ("cpu", "CPUs"),
    ):
        values = sorted({str(record["environment"][name]) for record in kept})
        if len(values) > 1:
            notes.append(f"The records come from {len(values)} {what}: {', '.join(values)}.")
    return kept, notes


def score(task: str, record: Record) -> float:
    loss = record["final"]["loss"]
    return math.log10(loss) if task in LOG_TASKS else loss


def search_records(
    contender: str, records: Sequence[Record], table: Mapping[str, Any], grid: Mapping[str, Any]
) -> Search:
    """How far the records of a size reach in the tuning of a contender."""
    found = {
        (point_of(record), record["seed"]): record
        for record in records
        if record["contender"] == contender and record["role"] == "tune"
    }
    seeds = tuning_seeds_of(grid, table)
    options = grid["contenders"][contender]
    return search(table, options, seeds, lambda point, seed: found.get((point, seed)))


def make_row(
    task: str,
    contender: str,
    records: Sequence[Record],
    tuning: Sequence[Record],
    table: Mapping[str, Any],
    grid: Mapping[str, Any],
) -> Row:
    """Select on the tuning runs; take the reported runs at the selected point."""
    options = grid["contenders"][contender]
    tuner = tuning_table(grid, table)
    found = search_records(contender, tuning, tuner, grid)
    own = found.records if tuner is table else []
    row = Row(contender, options, own, found.is_complete, found.best, [])
    if row.best is not None:
        row.edges = edges(row.best, axes_of(tuner, options))
        reports = [
            record
            for record in records
            if record["contender"] == contender
            and record["role"] == "report"
            and point_of(record) == row.best
        ]
        row.reports = sorted(reports, key=lambda record: record["seed"])
        row.losses = {
            record["seed"]: score(task, record) for record in row.reports if not record["diverged"]
        }
    return row


def best_per_rate(row: Row) -> dict[float, float]:
    """By learning rate, in order, the least tuning loss over the warm-ups and ratios tried."""
    losses: dict[float, float] = {}
    for point, loss in sorted(tuning_means(row.tuning).items()):
        losses[point.lr] = min(loss, losses.get(point.lr, loss))
    return losses


def summarise(
    task: str,
    size: str,
    records: Sequence[Record],
    grid: Mapping[str, Any],
    tuned_by: Sequence[Record] = (),
) -> Summary:
    """Everything that the tables and pictures of a training task show.

    Args:
        task: name of the task.
        size: name of the size.
        records: those of this task and size.
        grid: what load_grid returned.
        tuned_by: the records of the task and size in the table's `tuned_by`, if it has that.
    """
    table = grid["tasks"][task][size]
    tuner = tuning_table(grid, table)
    kept, notes = current_records(records, table, grid)
    tuning = kept if tuner is table else current_records(tuned_by, tuner, grid)[0]
    names = {record["contender"] for record in kept}
    order = [name for name in grid["contenders"] if name in names]
    rows = [make_row(task, name, kept, tuning, table, grid) for name in order]
    by_name = {row.contender: row for row in rows}
    baselines = [name for name in baselines_of(grid, table) if name in by_name]
    for row in rows:
        for name in baselines:
            if name != row.contender:
                row.differences[name] = paired_difference(row.losses, by_name[name].losses)
    rows.sort(key=lambda row: row.mean)
    partial = [row.contender for row in rows if not row.is_tuned]
    if partial:
        where = f" in {table['tuned_by']}" if "tuned_by" in table else ""
        notes.append(f"Tuning{where} is not complete for: {', '.join(partial)}.")
    waiting = [row.contender for row in rows if len(row.reports) < len(table["seeds"])]
    if waiting:
        notes.append(f"Reported seeds are missing for: {', '.join(waiting)}.")
    num_seeds = len(tuning_seeds_of(grid, tuner))
    data = kept[0]["data_sha256"] if kept else ""
    return Summary(task, size, table, tuner, rows, baselines, num_seeds, data, notes)
