"""What a run has measured: tables on the screen, JSON, CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
INSTALL = "pip install --no-build-isolation '.[bench]'"


class BenchError(Exception):
    """The run cannot go on; the message is one line for the user."""


@dataclass
class Report:
    """The records of one run; they are there from the moment they are measured."""

    command: str
    machine: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def note(self, text: str) -> None:
        """Say something that belongs to the results, such as what was left out."""
        self.notes.append(text)
        print(text, flush=True)

    def machine_line(self) -> str:
        """The machine in one line."""
        return "Machine: " + ", ".join(f"{key} {value}" for key, value in self.machine.items())

    def write_json(self, path: Path) -> None:
        """Write everything, single times included."""
        content = {
            "command": self.command,
            "machine": dict(self.machine),
            "settings": self.settings,
            "notes": self.notes,
            "interrupted": self.interrupted,
            "records": self.records,
        }
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def write_csv(self, path: Path) -> None:
        """Write one line per record; nested numbers get joined names, lists are left out."""
        rows = [flatten(record) for record in self.records]
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def flatten(record: Mapping[str, Any], prefix: str = "") -> Record:
    """{"a": {"b": 1}} becomes {"a.b": 1}; lists are dropped."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)):
            flat[prefix + key] = value
    return flat


Columns = Mapping[str, Callable[[Record], str]]


def print_table(columns: Columns, records: Sequence[Record]) -> None:
    """Print a Markdown table; all columns but the first hold numbers."""
    if not records:
        print("(nothing was measured)", flush=True)
        return
    print("| " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) - 1) + "|")
    for record in records:
        print("| " + " | ".join(column(record) for column in columns.values()) + " |")
    print(flush=True)
