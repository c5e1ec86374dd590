"""Time steps of parameters that are sharded over processes, with gloo on the CPU.

Bytes and collectives are counted as they are sent, and again on paper from the shards alone. The
columns are explained in bench/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dykaf
from bench.distributed_costs import messages
from bench.report import Columns, Record, Report, print_table
from bench.shapes import SHAPE_SETS, Workload
from dykaf.distributed import exchange, together, wire
from dykaf.distributed.balance import loads_of
from dykaf.distributed.plan import Plan

LAYOUTS = ("ddp", "ddp-sharded", "fsdp", "hsdp")
PERIOD = 50  # the default's; a whole one is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--periods", type=int, default=1, help=f"of {PERIOD} steps, measured")


class Counters:
    """Put in the place of what exchanges: counts bytes, collectives and the time that it takes.

    That is the time until a rank has what it waits for: of the wire, of copies, and of ranks that
    are later than this one.
    """

    def __init__(self) -> None:
        self.num_bytes = self.num_collectives = 0
        self.seconds = 0.0
        counters = self

        class CountingSwap(wire.Swap):
            def __init__(self, team: Any, outgoing: Any, incoming: Any, dtype: Any) -> None:
                start = time.perf_counter()
                super().__init__(team, outgoing, incoming, dtype)
                counters.num_collectives += 1
                counters.num_bytes += self._sent.numel() * self._sent.element_size()
                counters.seconds += time.perf_counter() - start

            def wait(self, device: torch.device) -> list[list[Tensor]]:
                start = time.perf_counter()
                received = super().wait(device)
                counters.seconds += time.perf_counter() - start
                return received

        def counting_agree_max(team: Any, numbers: Any) -> list[int]:
            start = time.perf_counter()
            found = wire.agree_max(team, numbers)
            counters.num_collectives += 1
            counters.seconds += time.perf_counter() - start
            return found

        exchange.Swap = CountingSwap  # type: ignore[misc]  # for this process, which measures
        together.agree_max = counting_agree_max

    def reset(self) -> None:
        self.num_bytes = self.num_collectives = 0
        self.seconds = 0.0


def bytes_on_paper(plan: Plan, rank: int) -> int:
    """What a rank sends in a step, from shards and owners.

    Parts of gradients of others' matrices; of updates of its own, each with a number, a chunk to
    each rank that holds the part; and copies of its chunks to the others that do.
    """
    total = 0
    for spread in plan.by_id.values():
        for matrix, owner in enumerate(spread.owners):
            holders, turn = spread.cut.holders(matrix), spread.index + matrix
            for _, source, target, size in messages(holders, owner, turn, spread.dtype.itemsize):
                total += size if source == rank != target else 0
    return total


def make(layout: str, workload: Workload) -> tuple[list[nn.Parameter], list[Tensor], Any]:
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(s, generator=generator) * scale for s in workload.shapes]

    def place(whole: Tensor) -> Tensor:
        if layout.startswith("ddp"):
            return whole
        shape, placements = (world,), [Shard(0)]
        if layout == "hsdp" and world > 2:
            shape, placements = (2, world // 2), [Replicate(), Shard(0)]
        mesh = init_device_mesh("cpu", shape)
        return distribute_tensor(whole, mesh, placements)

    params = [nn.Parameter(place(p)) for p in draw(0.02)]
    grads = [place(grad) for grad in draw(1e-3)]
    group = dist.group.WORLD if layout == "ddp-sharded" else None
    stacks = [param for param in params if param.ndim == 3]
    matrices = [param for param in params if param.ndim == 2]
    groups = [{"params": matrices}, {"params": stacks, "batch_dims": 1}]
    optimizer = dykaf.DyKAF(
        [some for some in groups if some["params"]],
        process_group=group,
        max_precond_dim=workload.max_precond_dim,
        precondition_frequency=PERIOD,
    )
    return params, grads, optimizer


def measure(
    rank: int, world: int, folder: str, layout: str, workload: Workload, num_periods: int
) -> None:
    """A rank: writes its own numbers."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    counters = Counters()
    params, grads, optimizer = make(layout, workload)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    for _ in range(1 + PERIOD):
        optimizer.step()
    times, shares = [], []
    for _ in range(num_periods * PERIOD):
        counters.reset()
        dist.barrier()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
        shares.append(counters.seconds / times[-1])
    found: Record = {
        "median": statistics.median(times),
        "mean": statistics.fmean(times),
        "worst": max(times),
        "exchange": statistics.fmean(shares),
        "bytes": counters.num_bytes,
        "collectives": counters.num_collectives,
        "state": optimizer.state_bytes()["total"],
        "paper": 0,
        "busiest": 1.0,
    }
    plan = getattr(optimizer._sharing, "plan", None)
    if plan is not None:
        found["paper"] = bytes_on_paper(plan, rank)
        spreads = [spread for spread in plan.by_id.values() if spread.owners]
        tasks = [task for spread in spreads for task in spread.tasks]
        owners = [owner for spread in spreads for owner in spread.owners]
        sums = [sum(load) for load in loads_of(tasks, owners, world)]
        found["busiest"] = max(sums) * world / sum(sums)
    torch.save(found, Path(folder) / f"rank-{rank}")
    dist.destroy_process_group()


COLUMNS: Columns = {
    "set": lambda r: f"{r['set']}, {r['layout']}",
    "ranks": lambda r: str(r["ranks"]),
    "step (ms)": lambda r: f"{1e3 * r['median']:.1f}",
    "mean (ms)": lambda r: f"{1e3 * r['mean']:.1f}",
    "worst (ms)": lambda r: f"{1e3 * r['worst']:.1f}",
    "over 1 process": lambda r: f"{r['mean'] / r['one']:.2f}" if r["one"] else "",
    "exchange": lambda r: f"{r['exchange']:.0%}",
    "sent (MB)": lambda r: f"{r['bytes'] / 1e6:.2f}",
    "on paper": lambda r: f"{r['paper'] / 1e6:.2f}",
    "collectives": lambda r: str(r["collectives"]),
    "busiest": lambda r: f"{r['busiest']:.2f}",
    "state (MB)": lambda r: f"{r['state'] / 1e6:.1f}",
}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure each set, layout and number of ranks in turn."""
    for name in options.sets:
        workload = SHAPE_SETS[name].workload(options.size)
        one = 0.0
        records: list[Record] = []
        for layout in options.layouts:
            for ranks in options.ranks:
                with tempfile.TemporaryDirectory() as folder:
                    arguments = (ranks, folder, layout, workload, options.periods)
                    mp.spawn(measure, arguments, nprocs=ranks)
                    found = [torch.load(Path(folder) / f"rank-{rank}") for rank in range(ranks)]
                record: Record = {"set": name, "layout": layout, "ranks": ranks}
                # The slowest rank, or the one that sends or keeps the most.
                record.update({key: max(some[key] for some in found) for key in found[0]})
                one = one or (record["mean"] if ranks == 1 else 0.0)
                record["one"] = one
                records.append(record)
                report.records.append(record)
        print_table(COLUMNS, records)
    report.note(
        "Each rank has one thread. Ranks beyond the machine's cores take turns: their times say "
        "what sharing costs, not what it gains."
    )
