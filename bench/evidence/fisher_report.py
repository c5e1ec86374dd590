"""Tables of the Fisher task."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]
CLOSE = 1.01  # within 1% of the best Kronecker product
SETTLED = 30  # averages start at this step


def settled_step(record: Record, method: str) -> int | None:
    """First measured step from which a method's in-sample error, in its own scale, stays CLOSE.

    (After one step a rank-one start is exact, for so is the average: that is not meant.)
    """
    found: int | None = None
    for point in record["points"]:
        if point["method"] == method and point["target"] == "in-sample":
            is_close = point["own"] is not None and point["own"] <= CLOSE
            found = (int(point["step"]) if found is None else found) if is_close else None
    return found


def average(records: Sequence[Record], method: str, target: str, measure: str) -> float | None:
    """Mean over seeds, scales and the steps from SETTLED on."""
    values = [
        point[measure]
        for record in records
        for point in record["points"]
        if point["method"] == method and point["target"] == target and point["step"] >= SETTLED
    ]
    return statistics.fmean(values) if values and None not in values else None


def span(values: Sequence[int | None]) -> str:
    """Smallest and largest of the steps; how many never came."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    text = f"{min(reached)}-{max(reached)}" if min(reached) < max(reached) else str(reached[0])
    missing = len(values) - len(reached)
    return f"{text} ({missing} of {len(values)} never)" if missing else text


def fisher_page(records: Sequence[Record], table: Mapping[str, Any]) -> str:
    """One table per problem and beta."""
    groups: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["contender"], record["options"]["beta"]].append(record)
    lines = [
        "Errors are relative to the best Kronecker product: 1 is optimal. In-sample: the average "
        "that the factors follow; next-step: the mean over fresh batches at the weights after the "
        f"step. Means over steps {SETTLED} to {table['settings']['steps']}, gradient scales and "
        "seeds. Off-diagonal: share of the squared norm outside the diagonal in the factors' "
        "eigenbasis, lower is better.",
        "",
    ]
    for (problem, beta), group in sorted(groups.items()):
        methods = list(dict.fromkeys(point["method"] for point in group[0]["points"]))
        scales = sorted({record["options"]["scale"] for record in group})
        lines += [
            f"## {problem}, beta {beta:g} ({len(group)} streams; gradient scales "
            f"{', '.join(f'{scale:g}' for scale in scales)})",
            "",
            "| method | in-sample within 1% from step (own scale) | in-sample, own scale "
            "| in-sample, best multiple | next-step, best multiple | off-diagonal in-sample "
            "| off-diagonal next-step |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for method in methods:
            columns = [
                ("in-sample", "own"),
                ("in-sample", "scaled"),
                ("next-step", "scaled"),
                ("in-sample", "off_diagonal"),
                ("next-step", "off_diagonal"),
            ]
            values = [average(group, method, *column) for column in columns]
            steps = "" if values[0] is None else span([settled_step(r, method) for r in group])
            cells = ["" if value is None else f"{value:.4f}" for value in values]
            lines.append(f"| {method} | {steps} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
