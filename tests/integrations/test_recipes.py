"""Each recipe learns something, and the table of recipes has each."""

from __future__ import annotations

import re
import runpy
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import torch
from conftest import RECIPES

ROOT = RECIPES.parents[1]
DOCS = ROOT / "docs" / "recipes"
# tool, page, version
TABLE = re.findall(r"^\| \[(.+?)\]\((\S+\.md)\) \| (\S+) \|", (DOCS / "index.md").read_text(), re.M)
NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a tenth of a nat at least, from the first quarter of a run to the last."""
    monkeypatch.chdir(tmp_path)  # some tools write where they are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the tools say of each other
        losses = runpy.run_path(str(RECIPES / f"{name}.py"))["main"]()
    quarter = -(-len(losses) // 4)
    assert sum(losses[-quarter:]) / quarter < sum(losses[:quarter]) / quarter - 0.1


def test_the_table_has_each_page_and_a_page_each_recipe() -> None:
    pages = [page for _, page, _ in TABLE]
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md") if path.stem != "index")
    texts = [(DOCS / page).read_text() for page in pages]
    for name in NAMES:
        assert sum(f"examples/recipes/{name}.py" in text for text in texts) == 1, name


def test_the_versions_of_the_table_are_those_that_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(pin.split("==") for pin in project["optional-dependencies"]["integrations"])
    assert {name: metadata.version(name) for name in pins} == pins
    said = {re.split(r"[:,]", tool)[0].lower(): version for tool, _, version in TABLE}
    assert {name: said[name] for name in pins} == pins
    assert torch.__version__.split("+")[0] == said["torch alone"]
