"""tqdm where it is installed; else the same calls without a bar."""

from __future__ import annotations

from typing import Any

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:  # type: ignore[no-redef]  # noqa: N801  # in tqdm's place
        """What the benchmarks use of it."""

        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> tqdm:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self) -> None:
            pass

        def set_description(self, text: str) -> None:
            pass

        @staticmethod
        def write(text: str) -> None:
            print(text, flush=True)


__all__ = ["tqdm"]
