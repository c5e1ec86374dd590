"""Tuning: which points of the grid are run for a contender, and which of them is selected.

A pure function of the records, shared by the plan of what runs next and by the report: a record
that the search did not ask for selects nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
AXES = {"lrs": "lr", "warmups": "warmup", "rest_ratios": "rest_ratio"}  # list -> field of a Point


@dataclass(frozen=True, order=True)
class Point:
    """What is tuned; the order breaks ties."""

    lr: float
    warmup: int
    rest_ratio: float | None = None  # None: the contender's options say nothing of it

    def options(self, contender: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a contender's runs at this point."""
        own = {} if self.rest_ratio is None else {"rest_ratio": self.rest_ratio}
        return {**contender, **own}


def point_of(record: Record) -> Point:
    return Point(record["lr"], record["warmup"], record["options"].get("rest_ratio"))


def axes_of(table: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each axis; a contender with a `rest_ratio` or `rest_lr` of its own keeps it."""
    is_fixed = "rest_ratio" in options or "rest_lr" in options
    own = [options.get("rest_ratio")]
    ratios = own if is_fixed else table.get("rest_ratios", own)
    return {"lrs": table["lrs"], "warmups": table["warmups"], "rest_ratios": ratios}


@dataclass(frozen=True)
class Search:
    """How far the tuning of a contender is."""

    asked: list[tuple[Point, int]]  # points and seeds so far, in the order of the runs
    records: list[Record]  # those of them that are there
    is_complete: bool
    best: Point | None  # once complete; None where all of a stage diverged
    num_later: int  # runs that stages to come can ask for at most


def search(
    table: Mapping[str, Any],
    options: Mapping[str, Any],
    seeds: Sequence[int],
    find: Callable[[Point, int], Record | None],
) -> Search:
    """Go through the stages of a table as far as the records reach.

    The axes of a stage are searched together; the others stand at the best point so far, at the
    start at the first values of their lists. Without `search` in the table, one stage has all.

    Args:
        table: a size of a task, with `lrs`, `warmups`, and maybe `rest_ratios` and `search`.
        options: the contender's.
        seeds: the tuning seeds.
        find: the record of a point and a seed, or None.
    """
    axes = axes_of(table, options)
    stages = table.get("search", [list(AXES)])
    best: Point | None = Point(*(values[0] for values in axes.values()))
    asked: dict[tuple[Point, int], None] = {}
    records: dict[tuple[Point, int], Record] = {}
    for idx, stage in enumerate(stages):
        lists = (
            values if name in stage else [getattr(best, AXES[name])]
            for name, values in axes.items()
        )
        points = [Point(*values) for values in itertools.product(*lists)]
        pairs = list(itertools.product(points, seeds))
        asked |= dict.fromkeys(pairs)
        found = {pair: record for pair in pairs if (record := find(*pair)) is not None}
        records |= found
        if len(found) < len(pairs):
            # The best point so far is one of each stage to come.
            later = sum(math.prod(len(axes[name]) for name in s) - 1 for s in stages[idx + 1 :])
            return Search(list(asked), list(records.values()), False, None, later * len(seeds))
        best = select(found.values())
        if best is None:
            break
    return Search(list(asked), list(records.values()), True, best, 0)


def tuning_means(tuning: Iterable[Record]) -> dict[Point, float]:
    """By point, the mean final loss over the tuning seeds, where all of them ended."""
    points: dict[Point, list[Record]] = {}
    for record in tuning:
        points.setdefault(point_of(record), []).append(record)
    return {
        point: statistics.fmean(record["final"]["loss"] for record in records)
        for point, records in points.items()
        if not any(record["diverged"] for record in records)
    }


def select(tuning: Iterable[Record]) -> Point | None:
    """The point of the lowest mean loss in tuning; None where all diverged.

    Ties go to the smaller learning rate, then to the shorter warm-up, then to the smaller ratio,
    whatever the order of the records.
    """
    means = tuning_means(tuning)
    return min(means, key=lambda point: (means[point], point), default=None)


def edges(best: Point, axes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Which fields of the selected point a longer list could better.

    That is the smallest and largest rate, the longest warm-up where there was a choice, and the
    smallest and largest ratio where there was one.
    """
    lrs, warmups, ratios = (axes[name] for name in AXES)
    at_end = {
        "lr": best.lr in (min(lrs), max(lrs)),
        "warmup": len(warmups) > 1 and best.warmup == max(warmups),
        "rest_ratio": len(ratios) > 1 and best.rest_ratio in (min(ratios), max(ratios)),
    }
    return [name for name, is_at_end in at_end.items() if is_at_end]
