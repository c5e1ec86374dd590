"""What the site has beyond the Markdown files of docs/.

Pages from elsewhere in the repository, links as they are on disk, formulas as MathML.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Pages by their place on the site, and the files that they come from.
OUTSIDE = {
    "index.md": "README.md",
    "benchmarks.md": "bench/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "evidence-protocol.md": "bench/evidence/README.md",
    "examples.md": "examples/README.md",
    "simt.md": "tests/simt/README.md",
}
RECIPES = (
    "index",
    "trainer",
    "trl",
    "accelerate",
    "lightning",
    "fabric",
    "peft",
    "timm",
    "plain_loop",
)

_LINK = re.compile(r"(!?)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^()\s]+)\)")
# GitHub's two forms: $`...`$ in a line, and a fence of the language "math".
_INLINE = re.compile(r"\$<code>(.+?)</code>\$", re.DOTALL)
_BLOCK = re.compile(r'<div class="formula">(.+?)</div>', re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Puts the recipes that are there into the navigation, the known ones first."""
    there = {path.stem for path in (ROOT / "docs/recipes").glob("*.md")}
    names = [name for name in RECIPES if name in there] + sorted(there - set(RECIPES))
    section = next(entry for entry in config.nav if "Recipes" in entry)
    section["Recipes"] = [f"recipes/{name}.md" for name in names]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Turns links between files of the repository into links between pages.

    A file that is not on the site is named without a link.
    """
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    places = {source: place for place, source in OUTSIDE.items()}

    def on_site(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, hash_mark, anchor = target.partition("#")
        on_disk = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not path or ":" in path or not (ROOT / on_disk).exists():
            return match[0]
        place = places.get(on_disk, on_disk.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return text
        here = posixpath.dirname(page.file.src_uri)
        return f"{picture}[{text}]({os.path.relpath(place, here or '.')}{hash_mark}{anchor})"

    return _LINK.sub(on_site, markdown)


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Renders formulas; on the page of the API, links what docstrings say of pages."""

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def block(match: re.Match[str]) -> str:
        # latex2mathml knows align* alone, MathJax allows aligned alone within a formula.
        formula = html.unescape(match[1]).strip().replace("{aligned}", "{align*}")
        return f'<div class="formula">{convert(formula, display="block")}</div>'

    content = _BLOCK.sub(block, _INLINE.sub(inline, content))
    return _docstrings(content) if page.file.src_uri == "api.md" else content


def _docstrings(content: str) -> str:
    """Sphinx's forms of links and code in docstrings, and the pages that these name."""

    def role(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        ids = re.findall(rf'id="([\w.]+\.{name})"', content)
        code = f"<code>{match[1]}</code>"
        return f'<a href="#{ids[0]}">{code}</a>' if ids else code

    content = re.sub(r":(?:func|class|meth|mod):<code>([\w.]+)</code>", role, content)
    content = re.sub(r"<p>\.\. code-block:: \w+</p>\n", "", content)
    return re.sub(r"\bdocs/([a-z-]+)\.md", r'<a href="\1.html">\1</a>', content)
