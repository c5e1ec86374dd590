"""Which products of large matrices cuBLAS computes on a GPU: rules, in a file of text.

``products.txt`` beside this module has the rules that hold unless the environment DYKAF_PRODUCTS or
:func:`dykaf.ops.use_products` names another file. ``python -m bench.tune`` writes one for the GPU
at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DEFAULT_FILE = Path(__file__).parent / "products.txt"
COLUMNS = ("capability", "precision", "form", "m", "n", "k", "by")
PRECISIONS = ("high", "medium")
FORMS = ("NN", "TN", "NT")
MOST = 2**31 - 1  # of a side

Range = tuple[int, int]  # both ends belong to it


class ProductRule(NamedTuple):
    """By what products ``D = op(A) op(B)``, ``[m, n]`` over k, are computed.

    Attributes:
        capability: of the GPU, 10 times major plus minor.
        precision: the group's ``matmul_precision``.
        form: which operand is transposed.
        m: sizes that the rule is for.
        n: the same.
        k: the same.
        by_library: by cuBLAS, and not by the package's kernels.
    """

    capability: Range
    precision: str
    form: str
    m: Range
    n: Range
    k: Range
    by_library: bool

    def fits(self, capability: int, precision: str, form: str, m: int, n: int, k: int) -> bool:
        """Whether the rule is for this product."""
        sizes = ((self.capability, capability), (self.m, m), (self.n, n), (self.k, k))
        return (self.precision, self.form) == (precision, form) and all(
            least <= size <= most for (least, most), size in sizes
        )


def are_by_library(
    rules: Iterable[ProductRule], capability: int, precision: str, form: str, m: int, n: int, k: int
) -> bool:
    """What the rules say of a product: the first that fits decides, and without one the kernels."""
    for rule in rules:
        if rule.fits(capability, precision, form, m, n, k):
            return rule.by_library
    return False


def parse(text: str, name: str) -> list[ProductRule]:
    """Reads rules: a line each in the order of ``COLUMNS``, empty lines, and comments from # on.

    Raises:
        ValueError: naming ``name``, the line, what was expected and what came.
    """
    rules: list[ProductRule] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if words:
            rules += _rules_of(words, f"{name}, line {number}")
    return rules


def read(path: str | Path) -> list[ProductRule]:
    """Reads the rules of a file; see :func:`parse`."""
    return parse(Path(path).read_text(encoding="utf-8"), str(path))


def _rules_of(words: list[str], place: str) -> list[ProductRule]:
    """A rule for each form that the line is for."""
    if len(words) != len(COLUMNS):
        raise ValueError(f"{place}: expected {' '.join(COLUMNS)}, got {len(words)} words")
    capability, precision, form, m_word, n_word, k_word, by = words
    _one_of("precision", precision, PRECISIONS, place)
    _one_of("form", form, (*FORMS, "any"), place)
    _one_of("by", by, ("cublas", "kernels"), place)
    capabilities = _capabilities(capability, place)
    m, n, k = (
        _range(name, word, place)
        for name, word in zip("mnk", (m_word, n_word, k_word), strict=True)
    )
    return [
        ProductRule(capabilities, precision, one, m, n, k, by == "cublas")
        for one in (FORMS if form == "any" else (form,))
    ]


def _one_of(name: str, word: str, words: tuple[str, ...], place: str) -> None:
    if word not in words:
        raise ValueError(f"{place}: {name}: expected one of {', '.join(words)}, got {word!r}")


def _range(name: str, word: str, place: str) -> Range:
    found = re.fullmatch(r"(\d+)(-?)(\d*)", word)
    if found is not None and bool(found[3]) <= bool(found[2]):
        least = int(found[1])
        most = int(found[3]) if found[3] else MOST if found[2] else least
        if least <= most <= MOST:
            return least, most
    raise ValueError(f"{place}: {name}: expected sizes as 768, 768- or 768-1024, got {word!r}")


def _capabilities(word: str, place: str) -> Range:
    found = re.fullmatch(r"(\d+)\.(\d)(-(\d+)\.(\d))?", word)
    if found is None:
        raise ValueError(f"{place}: capability: expected one as 9.0 or 9.0-9.9, got {word!r}")
    least = 10 * int(found[1]) + int(found[2])
    return least, 10 * int(found[4]) + int(found[5]) if found[3] else least
