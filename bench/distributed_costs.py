"""Bytes, collectives, state and work of a step with sharded parameters, counted on paper.

    python -m bench.distributed_costs              # a table for the screen
    python -m bench.distributed_costs --markdown   # the same for a document

Nothing here is measured. Owners, refresh slots and state are the package's own; bytes follow
python/dykaf/distributed/exchange.py. Times are bytes over published rates and multiply-adds over an
assumed one: bounds, without latency, packing or waits between collectives.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch

import dykaf
from bench.distributed_models import CASES, MODELS, Case, Param
from dykaf.distributed.balance import Task, assign, loads_of, task_of
from dykaf.distributed.cut import Box, Cut
from dykaf.distributed.exchange import BUCKET_BYTES
from dykaf.schedule import stagger_offsets
from dykaf.state import Layout

# Bytes per second and direction of one GPU.
NODE_RANKS = 8
NVLINK = 450e9  # NVIDIA H100 data sheet, SXM: NVLink 900 GB/s, the sum of both directions
INFINIBAND = 50e9  # NVIDIA ConnectX-7 data sheet: NDR, 400 Gb/s; one adapter per GPU
# An assumption, not a measurement: flops per second of tensor cores fed with float32 operands
# (mma.sync, TF32). The H100 data sheet's peak for dense TF32 is 494.7e12.
FLOP_RATE = 150e12
ADAMW_BYTES = 8  # two float32 moments per parameter

Holders = dict[Box, list[int]]


@lru_cache
def cut_of(param: Param, mesh: tuple[int, int, int]) -> tuple[Cut, list[Holders]]:
    """The parts of a parameter, and of each of its matrices who holds which."""
    num_replicas, num_shards, num_tensor = mesh
    boxes = []
    for _, shard, tensor in product(range(num_replicas), range(num_shards), range(num_tensor)):
        start, size = [0] * len(param.shape), list(param.shape)
        for dim, idx, num in ((param.tensor_dim, tensor, num_tensor), (0, shard, num_shards)):
            if dim is not None:  # DTensor's chunks: equal ones, the last ones less
                step = -(-size[dim] // num)
                low = min(size[dim], idx * step)
                start[dim] += low
                size[dim] = min(size[dim], low + step) - low
        boxes.append(Box(tuple(start), tuple(size)))
    cut = Cut(param.shape, param.num_batch, tuple(boxes))
    return cut, [cut.holders(matrix) for matrix in range(cut.count)]


class Traffic:
    """Bytes that each rank sends and receives in each collective."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.sent: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0] * num_ranks)
        self.received: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0] * num_ranks)

    def send(self, collective: tuple[int, str], source: int, target: int, size: int) -> None:
        """A rank keeps its own part."""
        if source != target:
            self.sent[collective][source] += size
            self.received[collective][target] += size

    @property
    def sent_by_rank(self) -> list[int]:
        return [sum(sizes) for sizes in zip([0] * self.num_ranks, *self.sent.values(), strict=True)]

    @property
    def slowest(self) -> int:
        """Bytes on the critical path: collectives of a group run one after the other, and each
        lasts until the rank that sends or receives the most is done."""
        return sum(max(*self.sent[key], *self.received[key]) for key in self.sent)


@dataclass(frozen=True)
class Costs:
    """The counts of a case."""

    case: Case
    tasks: list[Task]  # of each matrix with an owner
    owners: list[int]
    traffic: Traffic
    gathered: int  # bytes into a rank that gathers all gradients of matrices
    state: list[int]  # bytes by rank
    adamw_state: list[int]
    largest: tuple[float, int, int]  # of one matrix: multiply-adds in a mean step; m, n

    @cached_property
    def loads(self) -> list[list[int]]:
        return loads_of(self.tasks, self.owners, self.case.num_ranks)

    @property
    def mean(self) -> float:
        """Multiply-adds of a rank in a step, shared evenly."""
        return sum(map(sum, self.loads)) / len(self.loads[0]) / self.case.num_ranks

    @property
    def busiest(self) -> float:
        """Of the busiest rank of each step, the mean over a refresh period."""
        slowest: list[int] = [max(step) for step in zip(*self.loads, strict=True)]
        return sum(slowest) / len(slowest)

    @property
    def peak(self) -> int:
        """Of the busiest rank in the slowest step."""
        return max(map(max, self.loads))

    @property
    def collectives(self) -> int:
        """Up to three per bucket, where anything is sent, and the all-reduce of flags."""
        return len(self.traffic.sent) + 1


def default_options() -> dict[str, Any]:
    return dict(dykaf.DyKAF([torch.zeros(1)]).param_groups[0])


def state_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.shapes().values())


def count(case: Case, params: list[Param]) -> Costs:
    """The counts of a model's parameters over ranks.

    Args:
        case: the mesh and the dtype of the parameters; its model is not looked at.
        params: of the model.
    """
    num_ranks, itemsize = case.num_ranks, case.dtype.itemsize
    options = default_options()
    groups = {param: {**options, "batch_dims": param.num_batch} for param in params}
    for param in groups:
        if param.is_adamw:
            groups[param]["max_precond_dim"] = 0
    layouts = {
        param: Layout.of(torch.empty(param.shape, dtype=case.dtype, device="meta"), group)
        for param, group in groups.items()
    }
    period = int(options["precondition_frequency"])
    slots = stagger_offsets((layouts[param], period) for param in params)
    state, adamw_state = [0] * num_ranks, [0] * num_ranks
    gathered = [0] * num_ranks
    tasks: list[Task] = []
    places: list[tuple[int, int]] = []  # of each task's matrix: its parameter, its place there
    for index, (param, (left, right)) in enumerate(zip(params, slots, strict=True)):
        cut, holders = cut_of(param, case.mesh)
        layout = layouts[param]
        for rank, box in enumerate(cut.boxes):
            adamw_state[rank] += ADAMW_BYTES * box.numel
            if not param.is_adamw:
                gathered[rank] += itemsize * (math.prod(cut.shape) - box.numel)
            elif not case.is_plain and box.numel:
                local = Layout.of(torch.empty(box.size, device="meta"), groups[param])
                state[rank] += state_bytes(local)
        if case.is_plain or layout.is_matrix:
            for matrix, parts in enumerate(holders):
                whole = Box((0,) * len(cut.matrix_shape), cut.matrix_shape)
                ranks = parts.get(whole, range(num_ranks))
                turns = (left + matrix, right + matrix)
                tasks.append(task_of(layout, groups[param], turns, ranks))
                places.append((index, matrix))
    owners = assign(tasks, num_ranks, [None] * len(tasks))
    for (index, _), owner in zip(places, owners, strict=True):
        layout = layouts[params[index]]
        state[owner] += state_bytes(layout) // layout.count
    costs = [task.step + sum(task.refreshes) / task.period for task in tasks]
    dearest = costs.index(max(costs))
    of_largest = layouts[params[places[dearest][0]]]
    return Costs(
        case=case,
        tasks=tasks,
        owners=owners,
        traffic=traffic_of(case, params, places, owners),
        gathered=max(gathered),
        state=state,
        adamw_state=adamw_state,
        largest=(costs[dearest], of_largest.m, of_largest.n),
    )


def traffic_of(
    case: Case, params: list[Param], places: list[tuple[int, int]], owners: list[int]
) -> Traffic:
    """Gradients to owners; updates, in float32 with a number before each, in chunks to the holders
    of a part, and from each of them to the others."""
    traffic = Traffic(case.num_ranks)
    filled = [0] * case.num_ranks  # bytes of gradients in an owner's buckets so far
    before: dict[tuple[int, int], int] = {}  # by parameter and owner
    travels: dict[int, bool] = {}
    for (index, matrix), owner in zip(places, owners, strict=True):
        _, holders = cut_of(params[index], case.mesh)
        travels[index] = travels.get(index, False) or list(holders[matrix].values()) != [[owner]]
    for (index, matrix), owner in zip(places, owners, strict=True):
        if not travels[index]:
            continue
        cut, holders = cut_of(params[index], case.mesh)
        # What an owner has of one parameter is in one bucket.
        bucket = before.setdefault((index, owner), filled[owner]) // BUCKET_BYTES
        filled[owner] += case.dtype.itemsize * math.prod(cut.matrix_shape)
        for phase, *message in messages(
            holders[matrix], owner, index + matrix, case.dtype.itemsize
        ):
            traffic.send((bucket, phase), *message)
    return traffic


def messages(
    holders: Holders, owner: int, turn: int, itemsize: int
) -> Iterator[tuple[str, int, int, int]]:
    """Phase, source, target and bytes of all that is sent of a matrix, also to itself."""
    for box, ranks in holders.items():
        sender = owner if owner in ranks else ranks[turn % len(ranks)]
        yield "grads", sender, owner, itemsize * box.numel
        for place, holder in enumerate(ranks):
            first, last = (box.numel * (place + k) // len(ranks) for k in (0, 1))
            chunk = 4 * (1 + last - first)
            yield "updates", owner, holder, chunk
            for other in ranks:
                yield "copies", holder, other, chunk


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


COLUMNS: dict[str, Callable[[Costs], str]] = {
    "model, layout": lambda c: f"{c.case.model}, {c.case.layout}",
    "ranks": lambda c: f"{c.case.num_ranks:,}",
    "matrices": lambda c: f"{len(c.tasks):,}",
    "sent, GB": lambda c: number(max(c.traffic.sent_by_rank) / 1e9),
    "of gather, GB": lambda c: number(c.gathered / 1e9),
    "collectives": lambda c: str(c.collectives),
    "state, GB": lambda c: number(max(c.state) / 1e9),
    "of AdamW, GB": lambda c: number(max(c.adamw_state) / 1e9),
    "busiest / mean": lambda c: f"{c.busiest / c.mean:.2f}",
    "slowest step / mean": lambda c: f"{c.peak / c.mean:.2f}",
    "largest / mean": lambda c: f"{c.largest[0] / c.mean:.2f}{' (limit)' * is_limit(c)}",
    "exchange, ms": lambda c: number(1e3 * c.traffic.slowest / rate(c.case)),
    "compute, ms": lambda c: number(milliseconds(c.busiest)),
    "of gather, ms": lambda c: number(milliseconds(c.mean * c.case.num_ranks)),
}


def rate(case: Case) -> float:
    """Of one GPU: within a node, or between nodes."""
    return NVLINK if case.num_ranks <= NODE_RANKS else INFINIBAND


def milliseconds(multiply_adds: float) -> float:
    return 1e3 * 2 * multiply_adds / FLOP_RATE


def is_limit(costs: Costs) -> bool:
    """Whether one matrix takes longer than the even share of a rank."""
    return costs.largest[0] > costs.mean


def limit_lines(all_costs: Iterable[Costs]) -> Iterator[str]:
    """What would split the matrices that set the pace, by model and number of ranks."""
    found: dict[tuple[str, int], list[Costs]] = defaultdict(list)
    for costs in filter(is_limit, all_costs):
        found[costs.case.model, costs.case.num_ranks].append(costs)
    for (model, num_ranks), some in found.items():
        work, m, n = some[0].largest
        times, short = work / some[0].mean, min(m, n)
        layouts = "; ".join(costs.case.layout for costs in some)
        yield (
            f"{model}, {num_ranks:,} ranks ({layouts}): a {m} x {n} matrix alone takes {times:.1f} "
            f"times a rank's mean: no number of ranks makes a step faster "
            f"than {num_ranks / times:.0f} with even loads would. "
            f"{math.ceil(times)} blocks of its long side as separate matrices would split it, to "
            "another update. To keep this one, the short side's factor and the product in each "
            "Newton-Schulz step need a sum over the blocks: all-reduces of "
            f"{short} x {short} numbers ({number(4 * short**2 / 1e6)} MB each)."
        )


def lines(all_costs: list[Costs], with_padding: bool) -> Iterator[str]:
    rows = [list(COLUMNS)] + [[cell(c) for cell in COLUMNS.values()] for c in all_costs]
    widths = [max(map(len, column)) * with_padding for column in zip(*rows, strict=True)]
    for idx, (first, *rest) in enumerate(rows):
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        yield "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |"
        if idx == 0:
            yield "|---" + "|---:" * len(rest) + "|"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Costs of sharded steps, counted on paper.")
    parser.add_argument("--markdown", action="store_true", help="cells without padding")
    options = parser.parse_args(arguments)
    params = {name: make() for name, make in MODELS.items()}
    all_costs = [count(case, params[case.model]) for case in CASES]
    print("\n".join(lines(all_costs, not options.markdown)))
    for line in limit_lines(all_costs):
        print(f"\n{line}")


if __name__ == "__main__":
    main()
