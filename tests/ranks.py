"""Processes that run a function together, as ranks of a gloo group; started once per test file."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "dykaf"])
# Of a case, after which all its ranks are killed; of a collective within it.
TIMEOUT = 60.0
GROUP_TIMEOUT = 20.0


class Died(Exception):
    """A rank raised, ended or did not end in time; says what each of them did."""


def serve(connection: Connection, rank: int, stacks: str) -> None:
    """A rank: runs what comes, sends back what it gives."""
    import torch
    import torch.distributed as dist

    with Path(stacks).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message=".*sequential all_gather.*")
        while (task := connection.recv()) is not None:
            function, args, world, store, group_timeout = task
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=group_timeout),
                )
                result = function(*args)
                dist.barrier()  # torch 2.6 waits for ever to leave a group that others are in
                connection.send((True, result))
            except Exception:
                connection.send((False, traceback.format_exc()))
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


class Ranks:
    """Up to ``size`` ranks."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._num_stores = 0
        self._workers: list[tuple[Any, Connection]] = []

    def _stacks(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stacks-{rank}"

    def _start(self, world: int) -> None:
        for rank in range(len(self._workers), world):
            ours, theirs = CONTEXT.Pipe()
            args = (theirs, rank, str(self._stacks(rank)))
            process = CONTEXT.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int = 2,
        timeout: float = TIMEOUT,
        group_timeout: float = GROUP_TIMEOUT,
    ) -> list[Any]:
        """What ``function(*args)`` gives on each rank of a world of its own.

        Raises:
            Died: with each rank's exception, or the stacks of all if one does not end.
        """
        found = self.outcomes(
            function, *args, world=world, timeout=timeout, group_timeout=group_timeout
        )
        if not all(is_good for is_good, _ in found):
            said = [f"rank {rank}: {what}" for rank, (good, what) in enumerate(found) if not good]
            raise Died("\n".join(said))
        return [result for _, result in found]

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int = 2,
        timeout: float = TIMEOUT,
        group_timeout: float = GROUP_TIMEOUT,
    ) -> list[tuple[bool, Any]]:
        """Of each rank: whether it came to its end, and the result or the traceback."""
        self._start(world)
        self._num_stores += 1
        store = Path(self._folder.name) / f"store-{self._num_stores}"
        for _, connection in self._workers[:world]:
            connection.send((function, args, world, str(store), group_timeout))
        deadline = time.monotonic() + timeout
        found: list[tuple[bool, Any]] = []
        for process, connection in self._workers[:world]:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                stacks = self._dump_stacks()
                self.stop()
                raise Died(f"no end after {timeout} s; the stacks:\n{stacks}")
            try:
                found.append(connection.recv())
            except EOFError:
                process.join()
                found.append((False, f"the process ended, exit code {process.exitcode}"))
        if not all(process.is_alive() for process, _ in self._workers[:world]):
            self.stop()
        return found

    def _dump_stacks(self) -> str:
        for process, _ in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n".join(
            f"--- rank {rank}\n{self._stacks(rank).read_text()}"
            for rank in range(len(self._workers))
        )

    def stop(self) -> None:
        """Ends all ranks; the next run starts new ones."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []


def started() -> Iterator[Ranks]:
    """For a fixture of a test file."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
