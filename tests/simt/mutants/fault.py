"""What a fault is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: what is replaced, where, and the checks that ought to notice."""

    name: str
    file: str  # in csrc/cuda
    old: str  # occurs once in the file
    new: str
    checks: tuple[str, ...]  # prefixes of their names
    # Of the gemm kernels, where they are affected, the ones that are compiled.
    tiles: tuple[str, ...] = ("Medium",)
    precision: str = "Highest"


def faults(file: str, checks: tuple[str, ...], *rows: tuple, **fields) -> list[Mutant]:
    """Mutants of one file; a row is a name, the old text, the new text."""
    return [Mutant(name, file, old, new, checks, **fields) for name, old, new in rows]
