"""Each recipe learns something, and the table of recipes has each."""

from __future__ import annotations

import runpy
import warnings

import pytest
from conftest import RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """By a tenth of a nat at least, from the first quarter of a run to the last."""
    monkeypatch.chdir(tmp_path)  # some tools write where they are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the tools say of each other
        losses = runpy.run_path(str(RECIPES / f"{name}.py"))["main"]()
    quarter = -(-len(losses) // 4)
    assert sum(losses[-quarter:]) / quarter < sum(losses[:quarter]) / quarter - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_it(name: str) -> None:
    docs = RECIPES.parents[1] / "docs" / "recipes"
    assert f"examples/recipes/{name}.py" in (docs / "index.md").read_text()
