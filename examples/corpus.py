"""The corpus: the running Python's own standard library, split by file into train and validation.

It is real text that is present wherever Python is, needs no download, and is the same on every
machine that has the same Python version; the hash tells runs on different corpora apart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sysconfig
from pathlib import Path

import torch
from settings import UserError

# Test folders repeat themselves; site-packages hold whatever happens to be installed.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
# Written when that Python was built, with paths of the build machine inside.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two byte strings as uint8 tensors, and what identifies them."""

    train: torch.Tensor  # uint8 [num_train_bytes]
    validation: torch.Tensor  # uint8 [num_validation_bytes]
    num_files: int
    sha256: str


def is_validation(relative_path: str) -> bool:
    """Whether a file is held out: decided by its name alone, so it never changes sides."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


def list_files(root: Path) -> list[str]:
    """Relative posix paths of the Python files under root that belong to the corpus, sorted."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        if path.is_file() and not path.is_symlink():
            found.append(relative.as_posix())
    return sorted(found)


@functools.lru_cache(maxsize=1)
def load_corpus(root: Path | None = None) -> Corpus:
    """Read the corpus.

    Args:
        root: folder to read; the standard library of the running Python if None.

    Returns:
        The corpus; its hash covers names, lengths and contents of all files in order.

    Raises:
        UserError: there are no files for one of the two sides.
    """
    if root is None:
        root = Path(sysconfig.get_path("stdlib"))
    names = list_files(root)
    digest = hashlib.sha256()
    sides: dict[bool, bytearray] = {False: bytearray(), True: bytearray()}
    for name in names:
        data = (root / name).read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
        sides[is_validation(name)] += data
    if not sides[False] or not sides[True]:
        raise UserError(f"no Python source files to train on in {root}")
    return Corpus(
        train=torch.frombuffer(sides[False], dtype=torch.uint8),
        validation=torch.frombuffer(sides[True], dtype=torch.uint8),
        num_files=len(names),
        sha256=digest.hexdigest(),
    )


def gather_windows(data: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """Windows of context + 1 bytes: inputs are all but the last, targets all but the first.

    Args:
        data: uint8 [num_bytes].
        starts: int64 [num_windows], first byte of each window.
        context: inputs per window.

    Returns:
        int64 [num_windows, context + 1].
    """
    return data[starts[:, None] + torch.arange(context + 1)].long()


def sample_batch(
    data: torch.Tensor, batch: int, context: int, generator: torch.Generator
) -> torch.Tensor:
    """A random batch; the generator's state is all that the sampler remembers."""
    starts = torch.randint(data.numel() - context, (batch,), generator=generator)
    return gather_windows(data, starts, context)


def validation_windows(data: torch.Tensor, num_windows: int, context: int) -> torch.Tensor:
    """The fixed validation set: windows spread evenly over the held-out bytes."""
    starts = torch.linspace(0, data.numel() - context - 1, num_windows, dtype=torch.float64)
    return gather_windows(data, starts.long(), context)
