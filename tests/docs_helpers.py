"""The Markdown files of the repository, and the code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "docs", "examples", "tests")
SHELL = {"", "bash", "console", "sh", "shell"}


def pages() -> list[Path]:
    """Every Markdown file but those of tools' own folders."""
    return sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])


class Block(NamedTuple):
    """A fenced or indented block."""

    page: str
    line: int
    language: str
    text: str
    comment: str  # the HTML comment in the line before it, or ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a page; an indented one, which has no language, follows an empty line."""
    page = path.relative_to(ROOT).as_posix()
    lines = path.read_text().splitlines()
    idx = 0
    while idx < len(lines):
        start = idx
        fence = re.match(r"( *)```+ *([\w-]*)", lines[idx])
        if fence:
            indent, language = fence.groups()
            end = next(i for i in range(idx + 1, len(lines)) if lines[i].strip() == "```")
            text = [line.removeprefix(indent) for line in lines[idx + 1 : end]]
            idx = end + 1
        elif lines[idx].startswith("    ") and not lines[max(idx - 1, 0)].strip():
            language = ""
            while idx < len(lines) and (lines[idx].startswith("    ") or not lines[idx].strip()):
                idx += 1
            text = [line[4:] for line in lines[start:idx]]
        else:
            idx += 1
            continue
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        comment = re.fullmatch(r"<!-- (.+) -->", before.strip())
        yield Block(page, start + 1, language, "\n".join(text), comment[1] if comment else "")


def commands(block: Block) -> Iterator[str]:
    """The commands of a shell block, one a line: continued lines joined, comments taken off."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = " ".join(re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split())
        if command:
            yield command
