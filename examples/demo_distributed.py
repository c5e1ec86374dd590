"""The demonstration behind `make demo-distributed`: a checkpoint of two processes goes on in one.

    python examples/demo_distributed.py

Two processes, which it starts itself, train the small GPT of demo.py with FSDP2 and DyKAF, save
with torch.distributed.checkpoint halfway, and go on. Then one process loads the checkpoint and
goes on with the same batches. Exit codes: 0 the losses are equal to TOLERANCE, 1 they are not,
2 bad arguments or a process that failed, 3 the loss is no longer finite, 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import OneLineParser, Settings, UserError

NUM_RANKS = 2
NUM_POINTS = 4  # of comparison, after the checkpoint
# Nats per byte. The order of sums changes 1e-7; without half the momentum of one matrix it is 1e-3,
# without the optimizer's state 1e-1.
TOLERANCE = 1e-4


def advance(trainer: Any, last: int) -> None:
    """Trains to a step, with a validation before and at even distances."""
    every = max(1, (last - trainer.progress.step) // NUM_POINTS)
    trainer.validate()
    while trainer.progress.step < last:
        trainer.train_step()
        if trainer.progress.step % every == 0 or trainer.progress.step == last:
            trainer.validate()


def losses(curve: Sequence[dict[str, float]]) -> dict[int, float]:
    """Validation losses by step."""
    return {int(point["step"]): point["val_loss"] for point in curve}


def train_on_rank(rank: int, settings: Settings, saved_at: int, store: str) -> None:
    """What each of the processes does; they meet at store, the first one writes the losses."""
    import torch.distributed as dist
    from checkpoint import write_json
    from corpus import load_corpus
    from parallel import Ranks
    from training import Trainer

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_RANKS)
    trainer = Trainer(settings, load_corpus(), Ranks(settings))
    advance(trainer, saved_at)
    trainer.save()
    advance(trainer, settings.steps)
    if rank == 0:
        write_json(trainer.json_path, trainer.progress.curve)
    dist.destroy_process_group()


def compare(together: dict[int, float], alone: dict[int, float], first: int) -> float:
    """Prints losses side by side from a step on; returns the largest difference."""
    print(f"\n{'step':>5} {f'{NUM_RANKS} processes':>13} {'1 process':>11} {'difference':>11}")
    differences = []
    for step in sorted(step for step in together if step >= first):
        differences.append(abs(alone[step] - together[step]))
        print(f"{step:>5} {together[step]:>13.6f} {alone[step]:>11.6f} {differences[-1]:>11.1e}")
    # A NaN is no agreement either.
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value)


def run(settings: Settings) -> int:
    """Both parts and the comparison; returns the exit code."""
    import torch
    from corpus import load_corpus
    from parallel import Folders
    from training import Trainer

    saved_at = settings.steps // 2
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, load_corpus(), Folders())
    shutil.rmtree(trainer.checkpoint_path, ignore_errors=True)
    trainer.json_path.unlink(missing_ok=True)
    print(f"{NUM_RANKS} processes: {settings.steps} steps, a checkpoint after step {saved_at}")
    sharded = dataclasses.replace(settings, parallel="fsdp")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (sharded, saved_at, f"file://{folder}/store")
        try:
            torch.multiprocessing.spawn(train_on_rank, arguments, NUM_RANKS)
        except torch.multiprocessing.ProcessException as error:
            raise UserError(f"a process failed: {error}") from error
    print(f"1 process: from the checkpoint to step {settings.steps}")
    together = losses(json.loads(trainer.json_path.read_text()))
    trainer.resume()
    advance(trainer, settings.steps)
    alone = losses(trainer.progress.curve)
    difference = compare(together, alone, saved_at)
    is_equal = difference <= TOLERANCE
    print(
        f"\nvalidation losses in nats per byte, which fell by "
        f"{together[saved_at] - together[settings.steps]:.3f} in these steps. The batches are the "
        f"same;\n{NUM_RANKS} processes sum gradients in another order, which rounds otherwise. "
        f"Largest difference {difference:.1e}:\n"
        f"{'equal' if is_equal else 'NOT equal'} to the tolerance of {TOLERANCE:g}"
    )
    return 0 if is_equal else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = OneLineParser(prog="demo_distributed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-distributed"))
    options = parser.parse_args(argv)
    try:
        settings = Settings(
            steps=options.steps, warmup=options.steps // 10, out=options.out, threads=1
        )
        settings.check()
        from training import Diverged

        if settings.steps < 2:
            raise UserError(f"--steps must be at least 2, got {settings.steps}")
        return run(settings)
    except (UserError, OSError, ImportError) as error:
        print(f"demo_distributed.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"demo_distributed.py: error: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
