"""The grid file, and what it says to run next, given what has been recorded."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.evidence import EvidenceError
from bench.evidence.stats import select

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRID_FILE = Path(__file__).parent / "grid.toml"
# task -> module of bench.evidence.tasks
MODULES = {
    "shakespeare": "byte_lm",
    "stdlib": "byte_lm",
    "lora": "lora",
    "vision": "vision",
    "digits": "digits",
    "fisher": "fisher",
}
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome on one machine, apart from versions."""

    task: str
    size: str
    contender: str
    options: dict[str, Any]
    lr: float
    warmup: int
    seed: int
    role: str  # "tune": scored on the tuning part of the held-out data; "report": on the rest
    settings: dict[str, Any]
    data_sha256: str

    @property
    def key(self) -> str:
        """Identity: a change of any field, such as an option in the grid file, is another run."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        return (
            f"{self.task} {self.size} {self.contender} {self.role} "
            f"lr {self.lr:g} warm-up {self.warmup} seed {self.seed}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """One task in one size, as the grid file describes it."""

    task: str
    size: str
    table: dict[str, Any]
    contenders: dict[str, dict[str, Any]]  # the chosen ones, in order
    tuning_seeds: list[int]
    data_sha256: str

    def run(self, contender: str, lr: float, warmup: int, seed: int, role: str) -> Run:
        options = self.contenders[contender]
        task, size, data = self.task, self.size, self.data_sha256
        settings = settings_of(self.table, contender)
        return Run(task, size, contender, options, lr, warmup, seed, role, settings, data)

    def tuning_runs(self, contender: str) -> list[Run]:
        points = itertools.product(self.table["lrs"], self.table["warmups"], self.tuning_seeds)
        return [self.run(contender, *point, "tune") for point in points]

    def report_runs(self, contender: str, lr: float, warmup: int) -> list[Run]:
        return [self.run(contender, lr, warmup, seed, "report") for seed in self.table["seeds"]]

    def runnable(self, done: Mapping[str, Record]) -> list[Run]:
        """Runs whose turn can come now, first things first.

        All tuning comes before all reports. Reports go seed by seed over all contenders, so that
        whenever it stops, what is there can be compared in pairs.
        """
        if self.task == "fisher":
            return [run for run in self.fisher_runs() if run.key not in done]
        tuning, reports = [], []
        for contender in self.contenders:
            runs = self.tuning_runs(contender)
            missing = [run for run in runs if run.key not in done]
            tuning += missing
            best = None if missing else select([done[run.key] for run in runs])
            if best is not None:
                reports += self.report_runs(contender, best["lr"], best["warmup"])
        reports.sort(key=lambda run: self.table["seeds"].index(run.seed))
        return tuning + [run for run in reports if run.key not in done]

    def fisher_runs(self) -> list[Run]:
        """One run per problem, beta, gradient scale and seed; it follows all methods at once."""
        table = self.table
        axes = itertools.product(table["problems"], table["betas"], table["scales"], table["seeds"])
        return [
            Run(
                self.task,
                self.size,
                problem,
                {"beta": beta, "scale": scale},
                0.0,
                0,
                seed,
                "report",
                table["settings"],
                self.data_sha256,
            )
            for problem, beta, scale, seed in axes
        ]

    def total(self) -> int:
        """Number of runs of the whole plan."""
        table = self.table
        if self.task == "fisher":
            return len(self.fisher_runs())
        num_tuning = len(table["lrs"]) * len(table["warmups"]) * len(self.tuning_seeds)
        return len(self.contenders) * (num_tuning + len(table["seeds"]))


def settings_of(table: Mapping[str, Any], contender: str) -> dict[str, Any]:
    """The settings of a contender's runs; a size may give each a number of steps of its own."""
    steps = table.get("steps", {}).get(contender)
    return table["settings"] if steps is None else {**table["settings"], "steps": steps}


def tuning_seeds_of(grid: Mapping[str, Any], table: Mapping[str, Any]) -> list[int]:
    """A size may have seeds of its own to select by, where one decides too little."""
    return list(table.get("tuning_seeds", [grid["tuning_seed"]]))


def baselines_of(grid: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Whom the contenders of a size are compared with in pairs."""
    return list(table.get("baselines", grid["baselines"]))


def task_module(task: str) -> ModuleType:
    """The module that builds a task; imported when needed, for it may import torch and more."""
    return importlib.import_module(f"bench.evidence.tasks.{MODULES[task]}")


def load_grid(path: Path = GRID_FILE) -> dict[str, Any]:
    """The grid file; every contender that a task names must exist."""
    with path.open("rb") as file:
        grid = tomllib.load(file)
    for task, sizes in grid["tasks"].items():
        for size, table in sizes.items():
            unknown = set(table.get("contenders", [])) - set(grid["contenders"])
            if unknown:
                raise EvidenceError(f"{path}: [tasks.{task}.{size}]: no contender {min(unknown)}")
    return grid


def make_plan(
    grid: Mapping[str, Any], task: str, size: str, only: Iterable[str] | None = None
) -> Plan:
    """The plan of a task, with its data at hand (downloaded if need be).

    Args:
        grid: what load_grid returned.
        task: name of the task.
        size: name of the size.
        only: contenders to keep, in this order; None: the task's own list.

    Raises:
        EvidenceError: there is no such size or contender, or the data cannot be had.
    """
    sizes = grid["tasks"][task]
    if size not in sizes:
        raise EvidenceError(f"{task} has the sizes {', '.join(sizes)}, got {size}")
    table = sizes[size]
    names = list(table.get("contenders", [])) if only is None else list(only)
    for name in names:
        if name not in grid["contenders"]:
            raise EvidenceError(f"no contender {name}; see {GRID_FILE.name}")
    return Plan(
        task,
        size,
        table,
        {name: grid["contenders"][name] for name in names},
        tuning_seeds_of(grid, table),
        task_module(task).data_sha256(task, table["settings"]),
    )
