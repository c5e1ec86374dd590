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
from bench.evidence.search import AXES, Point, Search, search

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRID_FILE = Path(__file__).parent / "grid.toml"
# task -> module of bench.evidence.tasks
MODULES = {
    "shakespeare": "byte_lm",
    "stdlib": "byte_lm",
    "bible": "byte_lm",
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
        ratio = self.options.get("rest_ratio")
        rest = "" if ratio is None else f" rest {ratio:g}"
        return (
            f"{self.task} {self.size} {self.contender} {self.role} "
            f"lr {self.lr:g}{rest} warm-up {self.warmup} seed {self.seed}"
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
    tuner: Plan | None = None  # whose selected points are taken; None: tuned here

    def run(self, contender: str, point: Point, seed: int, role: str) -> Run:
        return Run(
            self.task,
            self.size,
            contender,
            point.options(self.contenders[contender]),
            point.lr,
            point.warmup,
            seed,
            role,
            settings_of(self.table, contender),
            self.data_sha256,
        )

    def search(self, contender: str, done: Mapping[str, Record]) -> Search:
        """How far the tuning of a contender is, here or where the table says it is tuned."""
        plan = self.tuner or self

        def find(point: Point, seed: int) -> Record | None:
            return done.get(plan.run(contender, point, seed, "tune").key)

        return search(plan.table, plan.contenders[contender], plan.tuning_seeds, find)

    def asked(self, done: Mapping[str, Record]) -> list[Run]:
        """Runs whose turn has come, done or not, first things first.

        All tuning comes before all reports. Reports go seed by seed over all contenders, so that
        whenever it stops, what is there can be compared in pairs.

        Args:
            done: records by key, those of the plan that this one is tuned by among them.
        """
        if self.task == "fisher":
            return self.fisher_runs()
        tuning, reports = [], []
        for contender in self.contenders:
            found = self.search(contender, done)
            if self.tuner is None:
                tuning += [self.run(contender, *pair, "tune") for pair in found.asked]
            if found.best is not None:
                seeds = self.table["seeds"]
                reports += [self.run(contender, found.best, seed, "report") for seed in seeds]
        reports.sort(key=lambda run: self.table["seeds"].index(run.seed))
        return tuning + reports

    def runnable(self, done: Mapping[str, Record]) -> list[Run]:
        """What of `asked` is missing."""
        return [run for run in self.asked(done) if run.key not in done]

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

    def total(self, done: Mapping[str, Record]) -> int:
        """Number of runs of the whole plan, done or not.

        While a search in stages is not complete, this is the most that it can come to.
        """
        if self.task == "fisher":
            return len(self.fisher_runs())
        total = 0
        for contender in self.contenders:
            found = self.search(contender, done)
            total += 0 if self.tuner else len(found.asked) + found.num_later
            is_lost = found.is_complete and found.best is None
            total += 0 if is_lost else len(self.table["seeds"])
        return total


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


def tuning_table(grid: Mapping[str, Any], table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table whose lists are searched: of a size that is tuned by another, the other's."""
    return find_table(grid, table["tuned_by"]) if "tuned_by" in table else table


def find_table(grid: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table of "task/size".

    Raises:
        EvidenceError: there is none.
    """
    task, _, size = name.partition("/")
    table = grid["tasks"].get(task, {}).get(size)
    if table is None:
        raise EvidenceError(f"the grid has no task and size {name}")
    return table


def load_grid(path: Path = GRID_FILE) -> dict[str, Any]:
    """The grid file, checked.

    Raises:
        EvidenceError: something that it names is not there, or a list is never searched.
    """
    with path.open("rb") as file:
        grid = tomllib.load(file)
    contenders = grid["contenders"]
    for name, options in contenders.items():
        if "base" in options:
            base = options.pop("base")
            if base not in contenders:
                raise EvidenceError(f"{path}: {name}: no contender {base}")
            contenders[name] = {**contenders[base], **options}
    for task, sizes in grid["tasks"].items():
        for size, table in sizes.items():
            try:
                check_table(grid, table)
            except EvidenceError as error:
                raise EvidenceError(f"{path}: [tasks.{task}.{size}]: {error}") from error
    for name, members in grid.get("axes", {}).items():
        for member in members:
            if "lrs" not in find_table(grid, member):
                raise EvidenceError(f"{path}: [axes] {name}: {member} is not tuned")
    return grid


def check_table(grid: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    unknown = set(table.get("contenders", [])) - set(grid["contenders"])
    if unknown:
        raise EvidenceError(f"no contender {min(unknown)}")
    lists = [name for name in AXES if name in table]
    if "tuned_by" in table:
        if lists or "search" in table:
            raise EvidenceError("tuned_by, and lists to tune")
        if "lrs" not in find_table(grid, table["tuned_by"]):
            raise EvidenceError(f"tuned_by: {table['tuned_by']} is not tuned itself")
    if "search" in table:
        searched = {name for stage in table["search"] for name in stage}
        if searched != set(lists):
            raise EvidenceError(f"search: expected stages of {', '.join(lists)}")


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
    tuner = None
    if "tuned_by" in table:
        tuner = make_plan(grid, *table["tuned_by"].split("/"), names)
    return Plan(
        task,
        size,
        table,
        {name: grid["contenders"][name] for name in names},
        tuning_seeds_of(grid, table),
        task_module(task).data_sha256(task, table["settings"]),
        tuner,
    )
