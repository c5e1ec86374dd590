"""Links of the Markdown files, as a reader of the files follows them; the options table."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from docs_helpers import ROOT, blocks, pages

import dykaf

LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")


def prose(page: Path) -> str:
    """The page without its blocks and code."""
    text = page.read_text()
    for block in blocks(page):
        for line in block.text.splitlines():
            text = text.replace(line, "") if line.strip() else text
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The headings' anchors: lower case, without punctuation, spaces as dashes."""
    heads = re.findall(r"^#+ +(.+?) *$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target}: no such file"
        assert place.is_relative_to(ROOT), f"{target}: outside of the repository"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading"


def test_there_are_links_to_check() -> None:
    found = {page: LINK.findall(prose(page)) for page in pages()}
    assert sum(map(len, found.values())) > 60
    assert "docs/install.md" in found[ROOT / "README.md"]
    assert "#the-bound" in found[ROOT / "docs/algorithm.md"]


def test_no_page_is_mentioned_without_a_link() -> None:
    """In the pages of a reader of the site, to whom a path says little."""
    for page in (ROOT / "docs").glob("*.md"):
        mentions = re.findall(r"(?<![\w/\[(])docs/[\w-]+\.md(?!\])", LINK.sub("", prose(page)))
        assert not mentions, f"{page.name}: {mentions}"


def test_the_table_of_options() -> None:
    table = (ROOT / "docs/options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
    told = {name: eval(default) for name, default in rows}
    parameters = inspect.signature(dykaf.DyKAF).parameters.values()
    assert told == {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in ("params", "process_group")
    }
    assert [name for name, _ in rows] == list(dict.fromkeys(name for name, _ in rows))
