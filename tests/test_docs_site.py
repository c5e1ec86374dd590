"""The site that `make docs` builds, where its tools are installed (`make docs` installs them)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from docs_helpers import ROOT, blocks

import dykaf

for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(tool)

# What a browser fetches to show a page.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
ALGORITHM = ROOT / "docs/algorithm.md"


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag in FETCHED and found.get(FETCHED[tag]):
            self.fetched.append(found[FETCHED[tag]] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def html(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / place.replace("README.html", "index.html")).exists(), place
    for name in ("index", "benchmarks", "changelog", "contributing", "examples"):
        assert (site / f"{name}.html").exists()
    assert not [*site.rglob("*.xz"), *site.rglob("*.py"), *site.rglob("*.jsonl")]


def test_nothing_is_fetched_from_elsewhere(html: dict[Path, Page], site: Path) -> None:
    for path, page in html.items():
        if path.name == "404.html":  # which any address may show
            continue
        assert len(page.fetched) > 3
        for target in page.fetched:
            assert not re.match(r"(https?:)?//", target), f"{path}: {target}"
            assert target.startswith("data:") or (path.parent / target.split("?")[0]).exists(), (
                target
            )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_links_resolve(html: dict[Path, Page]) -> None:
    """Seen in what was built, and so without the checks of mkdocs."""
    num_links = 0
    for path, page in html.items():
        for link in page.links:
            if path.name == "404.html" or re.match(r"https?:|mailto:", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            place = (path.parent / target).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{path.name}: {link}"
            if anchor and place.suffix == ".html":
                assert anchor in html[place].ids, f"{path.name}: {link}"
            num_links += 1
    assert num_links > 1000


def test_formulas_are_rendered(site: Path) -> None:
    source = ALGORITHM.read_text()
    in_fences = [block.text for block in blocks(ALGORITHM) if block.language == "math"]
    in_lines = re.findall(r"\$`[^`]+`\$", source)
    assert len(in_fences) > 15 and len(in_lines) > 100
    built = (site / "algorithm.html").read_text()
    assert built.count("<math ") == len(in_fences) + len(in_lines)
    formulas = re.findall(r'<div class="formula">(.*?)</div>', built, re.DOTALL)
    assert len(formulas) == len(in_fences)
    for latex, rendered in zip(in_fences, formulas, strict=True):
        assert 'display="block"' in rendered
        if "aligned" in latex:
            assert rendered.count("<mtr>") == latex.count(r"\\") + 1
    article = re.search(r"<article.*?</article>", built, re.DOTALL)
    assert article
    assert not re.search(r"\\[a-z]+|\$", re.sub(r"<[^>]*>", "", article[0]))
    assert not re.search(r"<m\w+>&(amp;)?</m", article[0])


def test_a_formula_says_what_its_source_says(site: Path) -> None:
    """The first on the page, the running average, symbol by symbol."""
    built = (site / "algorithm.html").read_text()
    formula = re.search(r'<div class="formula">(.*?)</div>', built, re.DOTALL)
    assert formula
    text = re.sub(r"<[^>]*>", "", formula[1])
    text = re.sub(r"&#x0*([0-9A-Fa-f]+);", lambda match: chr(int(match[1], 16)), text)
    assert re.sub(r"\s", "", text) == "F←βF+(1\N{MINUS SIGN}β)vec(G)vec(G)T,"
    assert re.search(r"<msup>.*?</msup>", formula[1])


def test_the_api_has_the_docstrings(site: Path) -> None:
    built = (site / "api.html").read_text()
    for name in ("dykaf.DyKAF", "dykaf.DyKAF.step", "dykaf.preset", "dykaf.plot.record"):
        assert f'id="{name}"' in built
    assert 'id="dykaf.param_groups.param_groups"' in built
    text = re.sub(r"<[^>]*>|\s+", " ", built)
    for sentence in (dykaf.DyKAF.step.__doc__, dykaf.param_groups.__doc__):
        assert sentence is not None
        first = sentence.split(".")[0].split("``")[0]
        assert " ".join(first.split()) in " ".join(text.split())
    assert ":func:" not in built and ":meth:" not in built and "code-block::" not in built


def test_the_search_has_its_index_as_a_script(site: Path) -> None:
    """Which a page that was opened as a file can load."""
    script = (site / "search/search_index.js").read_text()
    index: dict[str, Any] = json.loads(script.removeprefix("var __index = "))
    places = {entry["location"] for entry in index["docs"] if "staleness" in entry["text"]}
    assert {"plots.html", "tuning.html#by-symptom"} <= places
    assert "iframe-worker.js" in (site / "index.html").read_text()
