"""python -m bench host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.__main__ import main


def test_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--numbers", "3", "7", "--rounds", "2", "--groups", "2", "--json", str(path)]
    assert main(["host", *arguments]) == 0
    records = json.loads(path.read_text())["records"]
    found = [(record["kind"], record["number"]) for record in records]
    assert found == [("matrices", 3), ("matrices", 7), ("vectors", 3), ("vectors", 7)]
    for record in records:
        for name in ("native", "aten", "adamw"):
            assert 0 < record[name]["p10"] <= record[name]["median"] <= record[name]["p90"]
    out = capsys.readouterr().out
    assert "native: " in out
    assert all(f"| {number} {kind} |" in out for kind, number in found)
