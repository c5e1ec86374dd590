"""The demonstration behind `make demo`: the same small GPT trained with DyKAF, Muon and AdamW.

    python examples/demo.py

Each optimizer runs at its best learning rate of a small sweep (settings.DEFAULT_LR). A second
call trains anew into the same folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import DEFAULT_LR, OneLineParser, Settings, UserError
from torch import optim

DEMO_OPTIMIZERS = ("dykaf", "muon", "adamw") if hasattr(optim, "Muon") else ("dykaf", "adamw")


def clear(folder: Path) -> None:
    """Remove what an earlier demo left, so that the picture shows this one alone."""
    for name in DEMO_OPTIMIZERS:
        for suffix in ("json", "pt"):
            for path in folder.glob(f"{name}-*seed*.{suffix}"):
                path.unlink()


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table that the demo ends with; rows are runs with their wall seconds added."""
    lines = [
        f"{'optimizer':<10} {'lr':>7} {'val loss':>9} {'wall s':>7} {'optimizer':>10} "
        f"{'tokens/s':>9}"
    ]
    for run in rows:
        lines.append(
            f"{run['args']['optimizer']:<10} {run['args']['lr']:>7g} {run['val_loss']:>9.4f} "
            f"{run['wall_seconds']:>7.1f} {run['optimizer_share']:>10.1%} "
            f"{run['tokens_per_second']:>9,.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = OneLineParser(prog="demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args(argv)
    rows = []
    try:
        from plot import PICTURE
        from training import Diverged, Interrupted, train

        plan = [
            Settings(
                optimizer=name,
                lr=DEFAULT_LR[name],
                steps=options.steps,
                warmup=max(options.steps, 0) // 10,
                out=options.out,
            )
            for name in DEMO_OPTIMIZERS
        ]
        for settings in plan:
            settings.check()
        clear(options.out)
        for settings in plan:
            print(f"\n{settings.optimizer}, lr {settings.lr:g}, {settings.steps} steps")
            start = time.perf_counter()
            result = train(settings, resume=False)
            rows.append({**result, "wall_seconds": time.perf_counter() - start})
    except (UserError, OSError, ImportError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Interrupted as error:
        print("stopped", file=sys.stderr)
        return 128 + error.signal_number
    except Diverged as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 3
    print(f"\n{summary(rows)}\n\npicture: {options.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
