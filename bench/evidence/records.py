"""Results: one JSON object per line, appended as runs end and never rewritten.

What a report shows is kept with its pages as well, compressed.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def results_path(out: Path, task: str, size: str) -> Path:
    return out / f"{task}-{size}.jsonl"


def kept_path(docs: Path, task: str, size: str) -> Path:
    return docs / f"{task}-{size}.jsonl.xz"


def read_kept(path: Path) -> list[Record]:
    """The records behind a page."""
    if not path.exists():
        return []
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]


def keep_records(path: Path, records: Iterable[Record]) -> None:
    """Write the records behind a page."""
    lines = sorted(json.dumps(record, sort_keys=True) for record in records)
    path.write_bytes(lzma.compress("\n".join(lines).encode()))


def read_records(path: Path) -> list[Record]:
    """All records; a line cut short by a crash is left out, and its run is done again."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"note: {path}:{number} is damaged and left out", file=sys.stderr)
    return records


def append_record(path: Path, record: Record) -> None:
    """Append one line and make it durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if is_torn else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def known_records(out: Path, docs: Path | None, task: str, size: str) -> dict[str, Record]:
    """By key: those of the results file, and those kept with the pages in `docs`."""
    kept = [] if docs is None else read_kept(kept_path(docs, task, size))
    return by_key([*kept, *read_records(results_path(out, task, size))])


def by_key(records: Iterable[Record]) -> dict[str, Record]:
    """Records by their run's key; the last one counts."""
    return {record["key"]: record for record in records}
