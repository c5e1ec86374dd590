"""Runs plans: one process per core with one torch thread each, results appended as they come."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.evidence.grid import Plan, Run, task_module
from bench.evidence.records import append_record, known_records, results_path
from bench.evidence.training import train

Record = dict[str, Any]
REPORT_COMMAND = "python -m bench.evidence report"


# ---- In a worker ---------------------------------------------------------------------------------


def start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle; without a parent, end."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            wait_for_end([parent.sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """What a result depends on besides its run."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dykaf_sha256": dykaf_digest(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


def dykaf_digest() -> str | None:
    """Hash of the installed package's files: tells results of different states of it apart."""
    try:
        import dykaf
    except ImportError:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(dykaf.__file__).parent.iterdir()):
        if path.suffix in (".py", ".so"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def execute(run: Run) -> Record:
    """One run, start to end."""
    module = task_module(run.task)
    is_training = not hasattr(module, "execute")
    outcome = train(run, module.build(run)) if is_training else module.execute(run)
    return {"key": run.key, **dataclasses.asdict(run), **outcome, "environment": environment()}


# ---- In the parent -------------------------------------------------------------------------------


def seconds_per_run(plan: Plan, done: dict[str, Record]) -> float:
    """Mean of what has been recorded, else the grid's guess."""
    known = [
        record["cpu_seconds"]
        for record in done.values()
        if (record["task"], record["size"]) == (plan.task, plan.size)
    ]
    return statistics.fmean(known) if known else float(plan.table["seconds"])


def show_plan(plan: Plan, done: dict[str, Record], jobs: int) -> int:
    """Print what is to be done; returns the number of missing runs."""
    total = plan.total(done)
    num_done = count_done(plan, done)
    num_missing = total - num_done
    minutes = num_missing * seconds_per_run(plan, done) / 60 / jobs
    most = "up to " if "search" in plan.table else ""
    print(
        f"{plan.task} {plan.size}: data sha256 {plan.data_sha256[:16]}, {most}{total} runs, "
        f"{num_done} done before, about {minutes:.0f} minutes on {jobs} idle core(s)",
        flush=True,
    )
    if plan.tuner is not None:
        waiting = [name for name in plan.contenders if not plan.search(name, done).is_complete]
        if waiting:
            where = f"{plan.tuner.task}/{plan.tuner.size}"
            print(f"  not tuned yet in {where}: {', '.join(waiting)}", flush=True)
    return num_missing


def count_done(plan: Plan, done: dict[str, Record]) -> int:
    """Recorded runs of this plan (the file may hold others, of an older grid)."""
    return sum(run.key in done for run in plan.asked(done))


def run_plans(
    plans: Sequence[Plan],
    out: Path,
    jobs: int,
    docs: Path | None = None,
    *,
    only_show: bool = False,
) -> int:
    """Do all that is missing, one plan after the other; the records in `docs` count as done.

    Returns:
        0; 1 if runs failed with an error (their reason is on stderr, a second call tries them
        again); 130 if stopped.
    """
    done: dict[str, Record] = {}  # of all plans: one may wait for what another selects
    for plan in plans:
        for part in (plan.tuner, plan):
            if part is not None:
                done |= known_records(out, docs, part.task, part.size)
    missing = sum(show_plan(plan, done, jobs) for plan in plans)
    if only_show or missing == 0:
        return 0
    print(f"Ctrl-C keeps what is done; then, or at the end: {REPORT_COMMAND}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker)
    failed: set[str] = set()
    is_done = False
    try:
        with tqdm(total=missing, unit="run", disable=None, dynamic_ncols=True) as bar:
            for plan in plans:
                run_plan(plan, out, done, failed, executor, jobs, bar)
        is_done = True
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not spoil a clean end
            signal.signal(number, signal.SIG_IGN)
        for child in multiprocessing.active_children():  # our own workers, and no others
            child.terminate()
        print("stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print(
            "a worker was killed from outside (memory?); the same command goes on", file=sys.stderr
        )
        return 1
    finally:
        # Idle workers end at once; not to wait for them is a race with the interpreter's own end.
        executor.shutdown(wait=is_done, cancel_futures=True)
    return 1 if failed else 0


def run_plan(
    plan: Plan,
    out: Path,
    done: dict[str, Record],
    failed: set[str],
    executor: ProcessPoolExecutor,
    jobs: int,
    bar: Any,
) -> None:
    """Keep `jobs` runs going until the plan has no more; record each as it ends."""
    path = results_path(out, plan.task, plan.size)
    running: dict[Future[Record], Run] = {}
    total = plan.total(done)
    while True:
        busy = {run.key for run in running.values()} | failed
        for run in plan.runnable(done):
            if len(running) < jobs and run.key not in busy:
                running[executor.submit(execute, run)] = run
        if not running:
            return
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            run = running.pop(future)
            bar.update()
            error = future.exception()
            if error is not None:
                failed.add(run.key)
                print(f"failed: {run.title}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            record = future.result()
            append_record(path, record)
            done[run.key] = record
            before, total = total, plan.total(done)
            bar.total += total - before  # a search in stages may come to less than its most
            bar.write(f"{run.title}: {outcome_text(record)}")


def outcome_text(record: Record) -> str:
    """The result in a few words."""
    if record.get("diverged"):
        return "diverged"
    if record.get("final") is None:
        return "recorded"
    return f"{record['final']['loss']:.4g} in {record['cpu_seconds']:.0f} s"
