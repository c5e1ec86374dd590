"""How dykaf.param_groups routes the models of models.py: a table each, kept in golden/.

    PYTHONPATH=python python tests/integrations/golden.py --update

writes them again; read the difference. A line stands for all parameters whose names differ by
numbers alone. "bytes" is the state of each entry (AdamW's is 8).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import models

import dykaf
from dykaf.routing import plain_name

FOLDER = Path(__file__).with_name("golden")
HEADINGS = ("treatment", "shape", "count", "bytes", "parameter")


def origin(name: str) -> str:
    """Which releases of which libraries a model is of."""
    found = [f"{library} {version(library)}" for library in models.libraries(name)]
    return ", ".join(found)


def table(name: str) -> str:
    """The routing of one model by the defaults, as text."""
    optimizer = dykaf.DyKAF(dykaf.param_groups(models.build(name)))
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for row in dykaf.summary(optimizer).rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        bytes_each = f"{row.state_bytes / max(row.num_elements, 1):.1f}"
        counts[row.treatment, shape, bytes_each, row.name] += row.count
    lines = [HEADINGS]
    for (treatment, shape, bytes_each, parameter), count in counts.items():
        lines.append((treatment, shape, str(count), bytes_each, parameter))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([origin(name), "", *text, ""])


def unwrapped(text: str) -> list[str]:
    """The lines of a table without wrappers' parts in the names and without spacing."""
    lines = [line.split() for line in text.splitlines()[2:]]
    return [" ".join([*line[:-1], plain_name(line[-1])]) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the tables")
    parser.add_argument("names", nargs="*", help="of models; all if there are none")
    args = parser.parse_args()
    changed = []
    for name in args.names or models.NAMES:
        path, text = FOLDER / f"{name}.txt", table(name)
        if not path.exists() or path.read_text() != text:
            changed.append(name)
            if args.update:
                path.write_text(text)
    if not args.names:
        for path in FOLDER.glob("*.txt"):
            if path.stem not in models.NAMES:
                changed.append(path.stem)
                if args.update:
                    path.unlink()
    print(f"{len(changed)} {'written' if args.update else 'differ'}: {' '.join(changed) or '-'}")
    return 1 if changed and not args.update else 0


if __name__ == "__main__":
    sys.exit(main())
