"""Settings of one training run: the dataclass, its command line and its checks."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

OPTIMIZERS = ("dykaf", "adamw", "muon")
PARALLEL = ("none", "ddp", "ddp-sharded", "fsdp", "hsdp", "fsdp-tp")
REPLICAS = 2  # of a shard, with hsdp
TENSOR_RANKS = 2  # that share each matrix product, with fsdp-tp

# Best of the learning rates tried by sweep.py at the default model size (see README.md).
DEFAULT_LR = {"dykaf": 1.6e-2, "adamw": 2e-3, "muon": 1.6e-2}

# May change between an interrupted run and its continuation: they do not touch the trajectory
# (the number of threads may change the last bits, and so may the ranks; the run says so).
FREE_ON_RESUME = frozenset({"out", "threads", "checkpoint_every", "parallel"})


class UserError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Names are those of the command line."""

    optimizer: str = "dykaf"
    lr: float = DEFAULT_LR["dykaf"]
    steps: int = 300
    warmup: int = 30
    seed: int = 0
    dim: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 8
    weight_decay: float = 0.01
    precondition_frequency: int = 50
    eval_every: int = 25
    eval_windows: int = 256
    checkpoint_every: int = 100
    device: str = "cpu"
    parallel: str = "none"
    threads: int | None = None
    out: Path = Path("runs/gpt")

    @property
    def run_name(self) -> str:
        """File name of the run in its folder, without a suffix."""
        refresh = f"-every{self.precondition_frequency}" if self.optimizer == "dykaf" else ""
        return f"{self.optimizer}{refresh}-lr{self.lr:g}-seed{self.seed}"

    def trajectory(self) -> dict[str, str | int | float | None]:
        """The settings that a continuation must share with the run that it continues."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if name not in FREE_ON_RESUME}

    def to_json(self) -> dict[str, str | int | float | None]:
        """All settings as plain values."""
        return {**dataclasses.asdict(self), "out": str(self.out)}

    def check(self) -> None:
        """Check ranges and combinations.

        Raises:
            UserError: names the option, what it must be, and what it is.
        """
        if self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer}"
            )
        at_least = {
            "steps": 1,
            "warmup": 0,
            "seed": 0,
            "dim": 1,
            "layers": 1,
            "heads": 1,
            "context": 1,
            "batch": 1,
            "precondition_frequency": 1,
            "eval_every": 1,
            "eval_windows": 1,
            "checkpoint_every": 1,
            "threads": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{_option(name)} must be at least {least}, got {value}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr must be positive and finite, got {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight-decay must be at least 0, got {self.weight_decay}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2**63, got {self.seed}")
        if self.dim % (2 * self.heads) != 0:
            raise UserError(
                f"--dim must be a multiple of 2 * --heads = {2 * self.heads}, got {self.dim}"
            )
        if self.warmup > self.steps:
            raise UserError(f"--warmup must be at most --steps = {self.steps}, got {self.warmup}")
        self._check_parallel()
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out must be a folder, got the file {self.out}")

    def _check_parallel(self) -> None:
        ranks, of = ranks_of_torchrun(), f"--parallel {self.parallel}"
        if self.parallel == "none":
            if ranks is not None and ranks > 1:
                raise UserError(f"{of} is for one process, got {ranks} of torchrun")
            return
        if ranks is None:
            raise UserError(
                f"{of} needs torchrun: torchrun --nproc-per-node 2 examples/train_gpt.py {of}"
            )
        needed = {"hsdp": REPLICAS, "fsdp-tp": TENSOR_RANKS}.get(self.parallel, 1)
        if ranks % needed != 0:
            raise UserError(f"{of} needs a multiple of {needed} ranks, got {ranks}")
        if self.optimizer == "muon":
            raise UserError(f"{of} is for --optimizer dykaf and adamw, got muon")
        if self.parallel == "ddp-sharded" and self.optimizer != "dykaf":
            raise UserError(f"{of} is for --optimizer dykaf, got {self.optimizer}")
        num_parts = ranks
        if self.parallel == "fsdp-tp":
            num_parts = ranks // TENSOR_RANKS
            if self.context % TENSOR_RANKS != 0:
                raise UserError(
                    f"{of} needs --context to be a multiple of {TENSOR_RANKS}, got {self.context}"
                )
        for name in ("batch", "eval_windows"):
            if getattr(self, name) % num_parts != 0:
                raise UserError(
                    f"{of} on {ranks} ranks needs {_option(name)} to be a multiple of "
                    f"{num_parts}, got {getattr(self, name)}"
                )


def ranks_of_torchrun() -> int | None:
    """How many ranks torchrun started; None: it did not start this process."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of train_gpt.py."""
    base = Settings()
    parser = OneLineParser(
        prog="train_gpt.py",
        description="Train a byte-level GPT on the source of the running Python's own library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default=base.optimizer)
    add(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help="peak learning rate (default: the best of a small sweep, per optimizer)",
    )
    add("--steps", type=int, default=base.steps)
    add(
        "--warmup",
        type=int,
        default=argparse.SUPPRESS,
        help="steps of linear warm-up (default: a tenth of --steps)",
    )
    add("--seed", type=int, default=base.seed, help="seed of the weights and of the batches")
    add("--dim", type=int, default=base.dim, help="model width")
    add("--layers", type=int, default=base.layers)
    add("--heads", type=int, default=base.heads)
    add("--context", type=int, default=base.context, help="bytes in a window")
    add("--batch", type=int, default=base.batch, help="windows in a batch")
    add("--weight-decay", type=float, default=base.weight_decay)
    add(
        "--precondition-frequency",
        type=int,
        default=base.precondition_frequency,
        help="steps between basis refreshes (dykaf only)",
    )
    add("--eval-every", type=int, default=base.eval_every, help="steps between validations")
    add("--eval-windows", type=int, default=base.eval_windows, help="windows in a validation")
    add("--checkpoint-every", type=int, default=base.checkpoint_every)
    add("--device", choices=("cpu", "cuda"), default=base.device)
    add(
        "--parallel",
        choices=PARALLEL,
        default=base.parallel,
        help="how the ranks of torchrun share the run",
    )
    add(
        "--threads",
        type=int,
        default=argparse.SUPPRESS,
        help="CPU threads (default: torch's choice)",
    )
    add("--out", type=Path, default=base.out, help="folder of checkpoints, results and picture")
    add("--resume", action="store_true", help="continue this very run from its checkpoint in --out")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """Read a command line.

    Args:
        argv: the arguments, sys.argv[1:] if None.

    Returns:
        The checked settings, and whether to resume.

    Raises:
        UserError: an option is out of its range.
        SystemExit: argparse's own errors (code 2) and --help (code 0).
    """
    values = vars(build_parser().parse_args(argv))
    resume = bool(values.pop("resume"))
    values.setdefault("lr", DEFAULT_LR[values["optimizer"]])
    values.setdefault("warmup", max(values["steps"], 0) // 10)
    settings = Settings(**values)
    settings.check()
    return settings, resume


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def first_difference(saved: dict[str, object], settings: Settings) -> str | None:
    """Name the first setting in which a saved run differs from this one, None if there is none."""
    for name, value in settings.trajectory().items():
        if name not in saved or saved[name] != value:
            return f"{_option(name)} {saved.get(name, 'missing')}, got {value}"
    return None
