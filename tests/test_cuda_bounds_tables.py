"""python -m bench.cuda_bounds: its tables, in the document too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from bench import cuda_bounds as bounds
from bench import cuda_times as times
from bench.cuda_models import PRICED
from bench.cuda_rates import EAGER

DOC = Path(__file__).parent.parent / "docs" / "cuda.md"


def rows_of_document() -> Iterator[str]:
    yield from DOC.read_text().split(bounds.BEGIN)[1].split(bounds.END)[0].splitlines()


def test_the_document_has_the_tables_as_printed() -> None:
    steps = [times.step_of(make()) for make in PRICED]
    tables = [bounds.launch_table(steps), bounds.memory_table(steps), bounds.rate_table()]
    tables += [bounds.times_table(steps[0]), bounds.first_step_table(steps), bounds.figure_rows()]
    document = set(rows_of_document())
    for table in tables:
        for row in bounds.lines(table, with_padding=False):
            assert row in document, row


def test_every_number_says_what_it_is() -> None:
    _, *rows = bounds.figure_rows()
    assert len({row[0] for row in rows}) == len(rows)
    kinds = {"data sheet", "published measurement", "assumption", "measured on a CPU"}
    for row in rows:
        assert set(row[3].split(", ")) <= kinds and len(row[4]) > 10
    assert math.isclose(EAGER.value, 5e-6)
