"""Files that are either whole or absent: checkpoints and results are written beside their place
and renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from settings import UserError

FORMAT = "dykaf-example-gpt-1"
PLAIN_TYPES = (str, int, float, bool, type(None))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write on a temporary file of the same folder, then rename it to path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with a digest of all that is in it.

    Args:
        path: where to; an older checkpoint there is replaced.
        content: tensors, numbers, strings, None, lists and dicts of these.

    Raises:
        TypeError: there is something else in it, which could not be loaded again.
    """
    whole = {"format": FORMAT, "digest": _digest(content), "content": content}
    write_atomically(path, lambda file: torch.save(whole, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing but tensors and plain values is ever unpickled.

    Args:
        path: a file written by save_checkpoint.

    Returns:
        The content that was saved, on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, or it is not of this program.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint to resume from: {path}")
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, by where the damage is
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} is not of this program (format {FORMAT})")
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("digest") != _digest(content):
        raise UserError(f"checkpoint {path} is damaged: its digest does not match")
    return content


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: object) -> None:
    """Feed a tree of dicts, lists, tensors and plain values into a hash, bit by bit."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"tensor {flat.dtype} {tuple(flat.shape)};".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif type(value) in PLAIN_TYPES:
        digest.update(f"{value!r};".encode())
    else:
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
