"""Who holds which part of each parameter, and which rank works on which matrix.

A plan is made at the first step, for the parameters may be replaced by sharded ones until then, and
anew when parameters, shardings or options change. Owners stay who they are while there is state.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dykaf.distributed.balance import Task, assign, task_of
from dykaf.distributed.cut import Box, Cut, place_of
from dykaf.ops import Place
from dykaf.options import rules_of
from dykaf.schedule import Offsets
from dykaf.state import (
    HOST_KEYS,
    STRUCTURAL_OPTIONS,
    Layout,
    State,
    changed_options,
    check_state,
    new_state,
)

# What decides layouts and owners.
OPTIONS = (*STRUCTURAL_OPTIONS, "orthogonalize", "precondition_frequency")


@dataclass(frozen=True)
class Team:
    """The ranks that share parameters; places in it are those of the process group."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]  # of the world
    rank: int  # this one's place
    device: torch.device  # of what the group exchanges

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension."""
        ranks = torch.tensor(self.ranks, device="cpu")
        return DeviceMesh.from_group(self.group, self.device.type, ranks)


class Teams:
    """Makes each team once."""

    def __init__(self) -> None:
        self._teams: dict[tuple[tuple[int, ...], str], Team] = {}

    def of_mesh(self, mesh: DeviceMesh) -> Team:
        """All ranks of a mesh, of any number of dimensions."""
        ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
        if (ranks, mesh.device_type) not in self._teams:
            group: dist.ProcessGroup
            if mesh.ndim == 1:
                group = mesh.get_group()
            elif len(ranks) == dist.get_world_size():
                group = world()
            else:
                # Local: ranks outside of the mesh do not come here.
                group = dist.new_group(list(ranks), use_local_synchronization=True)
            self._teams[ranks, mesh.device_type] = _team(group, mesh.device_type)
        return self._teams[ranks, mesh.device_type]

    def of_group(self, group: dist.ProcessGroup, device_type: str) -> Team:
        """The ranks of a process group."""
        key = (tuple(dist.get_process_group_ranks(group)), device_type)
        if key not in self._teams:
            self._teams[key] = _team(group, device_type)
        return self._teams[key]


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def _team(group: dist.ProcessGroup, device_type: str) -> Team:
    device = torch.device("cpu")
    if device_type != "cpu":
        device = torch.device(device_type, torch.get_device_module(device_type).current_device())
    ranks = tuple(dist.get_process_group_ranks(group))
    return Team(group, ranks, dist.get_rank(group), device)


@dataclass(frozen=True, eq=False)
class Spread:
    """A parameter over the ranks of a team.

    One without factors whose shards have no owner is updated where they are, and so is a stack
    whose matrices are each whole on one rank (``stays``).
    """

    team: Team
    index: int  # of the parameter in the optimizer
    name: str
    group_idx: int
    structure: tuple[object, ...]  # the values of STRUCTURAL_OPTIONS
    layout: Layout  # of the whole
    cut: Cut
    owners: tuple[int, ...]  # of each matrix; empty: none has one
    tasks: tuple[Task, ...]  # of each matrix with an owner
    mesh: DeviceMesh | None  # of a DTensor
    placements: tuple[Placement, ...]
    dtype: torch.dtype  # of the parameter

    @cached_property
    def stays(self) -> bool:
        """Whether nothing of it has to go anywhere."""
        return all(
            list(self.cut.holders(matrix).values()) == [[owner]]
            for matrix, owner in enumerate(self.owners)
        )

    @cached_property
    def owned(self) -> tuple[int, ...]:
        """The matrices that this rank owns, or, without owners, holds a part of."""
        rank = self.team.rank
        if not self.owners:
            return (0,) if self.box.numel > 0 else ()
        return tuple(matrix for matrix, owner in enumerate(self.owners) if owner == rank)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Where ``owned`` has successive matrices: the first, its place in ``owned``, how many."""
        found = []
        pairs = enumerate(self.owned)
        for _, run in itertools.groupby(pairs, lambda pair: pair[1] - pair[0]):
            (place, first), *others = run
            found.append((first, place, 1 + len(others)))
        return found

    @property
    def box(self) -> Box:
        """What this rank holds."""
        return self.cut.boxes[self.team.rank]

    @cached_property
    def local_layout(self) -> Layout:
        """Of the state that this rank keeps."""
        if not self.owners:
            return dataclasses.replace(self.layout, shape=self.box.size, n=self.box.numel)
        return self.layout_of(len(self.owned))

    def layout_of(self, count: int, with_master: bool = False) -> Layout:
        """Of some of the matrices."""
        batch = (count,) if self.layout.batch else ()
        shape = (*batch, *self.cut.matrix_shape)
        master = self.layout.master and with_master
        return dataclasses.replace(self.layout, batch=batch, shape=shape, master=master)

    def sender(self, matrix: int, ranks: Sequence[int]) -> int:
        """Which of those that hold a part of the gradient sends it to the owner."""
        owner = self.owners[matrix]
        return owner if owner in ranks else ranks[(self.index + matrix) % len(ranks)]

    def place(self, matrix: int) -> Place:
        """Of this rank's part of a matrix, where rounding needs it.

        Raises:
            ValueError: for a part that is cut in too many dimensions.
        """
        part = self.cut.part(self.team.rank, matrix)
        is_rounded = self.dtype in (torch.bfloat16, torch.float16) and not self.layout.master
        if part is None or not is_rounded:
            return 0, 0, 0
        return place_of(self.name, self.cut.matrix_shape, part)

    def new_state(self, local: Tensor) -> State:
        """Zero state of what this rank owns, and the master copy of its shard.

        Without anything it has the same names with empty tensors, for a checkpoint that is flat is
        read by the names that a rank has.
        """
        if self.owned:
            state = new_state(local, dataclasses.replace(self.local_layout, master=False))
        else:
            state = self.empty_state(local.device)
        if self.layout.master:
            with torch.inference_mode(False):
                state["master"] = torch.empty_like(local, dtype=torch.float32).copy_(local)
        return state

    def empty_state(self, device: torch.device) -> State:
        """Of a rank that owns nothing, but for the master copy."""
        shapes = dataclasses.replace(self.layout, master=False).shapes()
        return {
            key: torch.empty(0, dtype=dtype, device="cpu" if key in HOST_KEYS else device)
            for key, (_, dtype) in shapes.items()
        }

    def check(self, state: State) -> None:
        """Checks the state that this rank has of it.

        Raises:
            ValueError: naming the parameter, what was expected and what came.
        """
        expected = dataclasses.replace(self.local_layout, master=False)
        if self.owned:
            own = {key: value for key, value in state.items() if key != "master"}
            check_state(self.name, own, expected)
        master = state.get("master")
        if self.layout.master and (master is None or tuple(master.shape) != self.box.size):
            got = "nothing" if master is None else tuple(master.shape)
            raise ValueError(f"state of {self.name}: 'master': expected {self.box.size}, got {got}")

    def is_number(self, key: str) -> bool:
        """Whether a state tensor has a number or two per matrix."""
        shape, _ = self.layout.shapes()[key]
        return key in HOST_KEYS or shape[len(self.layout.batch) :] in ((), (2,))


@dataclass(frozen=True)
class Description:
    """What a rank says of a parameter of a team."""

    what: str  # the same on all ranks
    options: dict[str, Any]  # and these
    box: Box
    owners: tuple[int, ...] | None  # that stay, for there is state


class Plan:
    """The spreads of all sharded parameters, by the parameter's id."""

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        names: Mapping[int, str],
        teams: Mapping[int, Team],
        former: Mapping[int, Spread],
    ) -> None:
        """Makes a plan, on all ranks of each team together.

        Args:
            param_groups: of the optimizer.
            names: of the parameters, by id.
            teams: of the sharded ones, by id.
            former: of those that have state; their owners stay.

        Raises:
            RuntimeError: on all ranks of a team that do not describe its parameters alike, naming
                the first difference.
            ValueError: for a parameter that cannot be spread as it is.
        """
        slots = Offsets().of(param_groups)
        params = [
            (group_idx, param)
            for group_idx, group in enumerate(param_groups)
            for param in group["params"]
        ]
        by_team: dict[Team, list[int]] = {}
        for index, (_, param) in enumerate(params):
            if id(param) in teams:
                by_team.setdefault(teams[id(param)], []).append(index)
        self.by_id: dict[int, Spread] = {}
        self.teams = sorted(by_team, key=lambda team: team.ranks)
        # How often a team's ranks compare what they have seen in a step: again where one of them
        # has heard of other teams since.
        self.passes: dict[Team, int] = {}
        for team in self.teams:
            items = [(index, *params[index]) for index in by_team[team]]
            said = [
                describe(index, names[id(param)], param, param_groups[group_idx], former)
                for index, group_idx, param in items
            ]
            agreed, num_teams = _agree(team, said, len(self.teams))
            self.passes[team] = 1 if num_teams == 1 else 2
            self._add(team, param_groups, items, names, slots, agreed)

    def _add(
        self,
        team: Team,
        param_groups: Sequence[Mapping[str, Any]],
        items: Sequence[tuple[int, int, Tensor]],
        names: Mapping[int, str],
        slots: Sequence[tuple[int, int]],
        agreed: Sequence[Agreed],
    ) -> None:
        tasks: list[Task] = []
        owners: list[int | None] = []
        spreads: list[tuple[Tensor, Spread]] = []
        for (index, group_idx, param), (boxes, before) in zip(items, agreed, strict=True):
            group = param_groups[group_idx]
            layout = Layout.of(param, group)
            mesh: DeviceMesh | None = None
            placements: tuple[Placement, ...] = ()
            if isinstance(param, DTensor):
                mesh, placements = param.device_mesh, tuple(param.placements)
            cut = Cut(tuple(param.shape), len(layout.batch), boxes)
            spread = Spread(
                team=team,
                index=index,
                name=names[id(param)],
                group_idx=group_idx,
                structure=tuple(group[option] for option in STRUCTURAL_OPTIONS),
                layout=layout,
                cut=cut,
                owners=(),
                tasks=(),
                mesh=mesh,
                placements=placements,
                dtype=param.dtype,
            )
            _check_cut(spread)
            for matrix in range(cut.count):
                spread.place(matrix)  # raises before anything is done
            spreads.append((param, spread))
            if mesh is None or layout.is_matrix:
                for matrix in range(cut.count):
                    left, right = slots[index]
                    ranks = _candidates(cut, matrix)
                    tasks.append(task_of(layout, group, (left + matrix, right + matrix), ranks))
                    owners.append(before[matrix] if before else None)
        found = iter(zip(assign(tasks, team.size, owners), tasks, strict=True))
        for param, spread in spreads:
            if spread.mesh is None or spread.layout.is_matrix:
                given = [next(found) for _ in range(spread.cut.count)]
                spread = dataclasses.replace(
                    spread,
                    owners=tuple(rank for rank, _ in given),
                    tasks=tuple(task for _, task in given),
                )
            self.by_id[id(param)] = spread

    def of(self, param: Tensor) -> Spread | None:
        """Of a parameter; None if this process has it alone."""
        return self.by_id.get(id(param))


def _candidates(cut: Cut, matrix: int) -> Sequence[int]:
    """Who may own a matrix: those that have it whole, if there are any."""
    whole = cut.holders(matrix).get(Box((0,) * len(cut.matrix_shape), cut.matrix_shape))
    return whole if whole is not None else range(len(cut.boxes))


def _check_cut(spread: Spread) -> None:
    cut = spread.cut
    parts = {box for box in cut.boxes if box.numel > 0}
    whole = Box((0,) * len(cut.shape), cut.shape)
    if sum(box.numel for box in parts) != whole.numel:
        raise ValueError(
            f"{spread.name}: expected shards that make up the whole {cut.shape}, got {parts}"
        )


def describe(
    index: int, name: str, param: Tensor, group: Mapping[str, Any], former: Mapping[int, Spread]
) -> Description:
    """What this rank has of a parameter.

    Raises:
        ValueError: for a placement that is no part of the parameter, and for options that its state
            cannot follow; all ranks see the same.
    """
    before = former.get(id(param))
    if before is not None and before.layout != Layout.of(param, group):
        values = [group[option] for option in STRUCTURAL_OPTIONS]
        changed = ", ".join(changed_options(before.structure, values)) or "its sharding"
        raise ValueError(f"state of {name}, which cannot follow a change of {changed}")
    shape = tuple(param.shape)
    placements = "replicated"
    box = Box((0,) * len(shape), shape)
    if isinstance(param, DTensor):
        placements = f"{tuple(param.placements)} on {tuple(param.device_mesh.shape)}"
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"{name}: expected sharded or replicated, got {param.placements}")
        size, start = compute_local_shape_and_global_offset(
            param.shape, param.device_mesh, param.placements
        )
        box = Box(tuple(start), tuple(size))
    # A tensor lr may be on a GPU, where reading it waits.
    options = {name: group[name] for name in rules_of(group) if not isinstance(group[name], Tensor)}
    what = f"parameter {index}, {name}: {param.dtype} {shape}, {placements}"
    return Description(what, options, box, before.owners if before is not None else None)


# The boxes of all ranks, and the owners that stay.
Agreed = tuple[tuple[Box, ...], tuple[int, ...]]
NOTHING = Description("nothing", {}, Box((), ()), None)


def _agree(team: Team, mine: Sequence[Description], num_teams: int) -> tuple[list[Agreed], int]:
    """Of each parameter what all ranks say, and how many teams a rank of this one has at most."""
    gathered: list[Any] = [None] * team.size
    dist.all_gather_object(gathered, (list(mine), num_teams), team.group)
    for rank, (others, _) in enumerate(gathered):
        for first, other in itertools.zip_longest(gathered[0][0], others, fillvalue=NOTHING):
            differing = _difference(first, other)
            if differing is not None:
                raise RuntimeError(
                    f"optimizer on {team.size} ranks: expected the same parameters on all, got\n"
                    f"  on rank {team.ranks[0]}: {differing[0]}\n"
                    f"  on rank {team.ranks[rank]}: {differing[1]}"
                )
    rows = [said for said, _ in gathered]
    agreed = [
        (tuple(said.box for said in column), column[0].owners or ())
        for column in zip(*rows, strict=True)
    ]
    return agreed, max(num for _, num in gathered)


def _difference(first: Description, other: Description) -> tuple[str, str] | None:
    if first.what != other.what:
        return first.what, other.what
    for name, value in first.options.items():
        if value != other.options.get(name):
            got = other.options.get(name)
            return f"{first.what}: {name}={value}", f"{other.what}: {name}={got}"
    if first.owners != other.owners:
        return f"{first.what}: owners {first.owners}", f"{other.what}: owners {other.owners}"
    return None
