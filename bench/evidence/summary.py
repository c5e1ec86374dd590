"""What the records of one task say: selected rates, reported losses, paired differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.evidence.grid import baselines_of, settings_of, tuning_seeds_of
from bench.evidence.stats import (
    Difference,
    edges,
    paired_difference,
    select,
    tuning_means,
)

Record = dict[str, Any]
# Gaps that span orders of magnitude are averaged and subtracted as logarithms.
LOG_TASKS = frozenset({"digits"})


@dataclass
class Row:
    """One contender."""

    contender: str
    tuning: list[Record]
    best: dict[str, Any] | None  # "lr" and "warmup", as stats.select has them
    reports: list[Record]  # at the selected rate
    edges: list[str] = field(default_factory=list)  # as stats.edges has them
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
    seeds = tuning_seeds_of(grid, table) if record["role"] == "tune" else table["seeds"]
    return (
        record["options"] == grid["contenders"].get(record["contender"])
        and record["lr"] in table["lrs"]
        and record["warmup"] in table["warmups"]
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


def make_row(task: str, contender: str, records: Sequence[Record], table: Mapping[str, Any]) -> Row:
    """Select on the tuning runs; take the reported runs at the selected rate."""
    own = [record for record in records if record["contender"] == contender]
    tuning = [record for record in own if record["role"] == "tune"]
    best = select(tuning)
    row = Row(contender, tuning, best, [])
    if best is not None:
        point = (best["lr"], best["warmup"])
        row.edges = edges(best, table["lrs"], table["warmups"])
        reports = [
            record
            for record in own
            if record["role"] == "report" and (record["lr"], record["warmup"]) == point
        ]
        row.reports = sorted(reports, key=lambda record: record["seed"])
        row.losses = {
            record["seed"]: score(task, record) for record in row.reports if not record["diverged"]
        }
    return row


def best_per_rate(row: Row) -> dict[float, float]:
    """By learning rate, in order, the least tuning loss over the warm-ups."""
    losses: dict[float, float] = {}
    for (lr, _), loss in sorted(tuning_means(row.tuning).items()):
        losses[lr] = min(loss, losses.get(lr, loss))
    return losses


def summarise(task: str, size: str, records: Sequence[Record], grid: Mapping[str, Any]) -> Summary:
    """Everything that the tables and pictures of a training task show."""
    table = grid["tasks"][task][size]
    kept, notes = current_records(records, table, grid)
    names = {record["contender"] for record in kept}
    order = [name for name in grid["contenders"] if name in names]
    rows = [make_row(task, name, kept, table) for name in order]
    by_name = {row.contender: row for row in rows}
    baselines = [name for name in baselines_of(grid, table) if name in by_name]
    for row in rows:
        for name in baselines:
            if name != row.contender:
                row.differences[name] = paired_difference(row.losses, by_name[name].losses)
    rows.sort(key=lambda row: row.mean)
    num_seeds = len(tuning_seeds_of(grid, table))
    num_tuning = len(table["lrs"]) * len(table["warmups"]) * num_seeds
    partial = [row.contender for row in rows if len(row.tuning) < num_tuning]
    if partial:
        notes.append(f"Tuning is not complete for: {', '.join(partial)}.")
    waiting = [row.contender for row in rows if len(row.reports) < len(table["seeds"])]
    if waiting:
        notes.append(f"Reported seeds are missing for: {', '.join(waiting)}.")
    data = kept[0]["data_sha256"] if kept else ""
    return Summary(task, size, table, rows, baselines, num_seeds, data, notes)
