"""One run on many ranks: who draws which windows, how the model is wrapped, checkpoints in folders.

A process that runs alone has an `Alone`, one that torchrun started a `Ranks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint, write_json
from model import GPT
from settings import REPLICAS, TENSOR_RANKS, Settings, UserError
from torch import nn

FACTS = "run.json"


class Alone:
    """A single process; its checkpoint is a file."""

    num_ranks = 1
    is_first = True  # the rank that talks and writes results
    process_group: Any = None  # over which DyKAF shares work on parameters that are not sharded
    suffix = "pt"

    def wrap(self, model: GPT) -> nn.Module:
        """Shards the model in place; gives what its forward pass goes through."""
        return model

    def ready(self, optimizer: Any) -> None:
        """Says what is to be said of a new optimizer."""

    def part_of(self, windows: torch.Tensor) -> torch.Tensor:
        """The windows that this rank works on."""
        return windows

    def mean(self, value: float) -> float:
        """The mean over all ranks."""
        return value

    def agreed(self, received: int | None) -> int | None:
        """The same on all ranks: the number of a signal that one of them received."""
        return received

    def save(
        self, path: Path, facts: dict[str, Any], states: dict[str, Any], model: GPT, optimizer: Any
    ) -> None:
        """Writes a checkpoint of plain facts, tensors, the model and the optimizer."""
        trained = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, {**facts, **states, **trained})

    def read(self, path: Path) -> dict[str, Any]:
        """The facts of a checkpoint, which `restore` takes.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return load_checkpoint(path)

    def restore(
        self, saved: dict[str, Any], states: dict[str, Any], model: GPT, optimizer: Any
    ) -> dict[str, Any]:
        """Brings model and optimizer to where they were; gives the saved states."""
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return {name: saved[name] for name in states}


class Folders(Alone):
    """A process whose checkpoints are folders of torch.distributed.checkpoint.

    They fit any number of ranks. Each save makes a new folder `step-N`, whole or absent, and
    removes the ones before.
    """

    suffix = "dcp"

    def save(
        self, path: Path, facts: dict[str, Any], states: dict[str, Any], model: GPT, optimizer: Any
    ) -> None:
        from torch.distributed import checkpoint

        name = f"step-{facts['progress']['step']}"
        temporary = path / f".{name}.tmp"
        if self.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.barrier()
        try:
            with quiet():
                checkpoint.save({**states, **trained(model, optimizer)}, checkpoint_id=temporary)
        except checkpoint.CheckpointException as error:
            raise OSError(f"cannot write {temporary}: {reason_of(error)}") from error
        if self.is_first:
            write_json(temporary / FACTS, facts)
            shutil.rmtree(path / name, ignore_errors=True)
            temporary.rename(path / name)
            for other in folders_in(path):
                if other.name != name:
                    shutil.rmtree(other)
        self.barrier()

    def barrier(self) -> None:
        """Waits for all ranks."""

    def read(self, path: Path) -> dict[str, Any]:
        folders = folders_in(path)
        if not folders:
            raise UserError(f"no checkpoint to resume from: {path}")
        try:
            facts = json.loads((folders[-1] / FACTS).read_text())
            return {**facts, "folder": folders[-1]}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"checkpoint {folders[-1]} is damaged: {FACTS}") from error

    def restore(
        self, saved: dict[str, Any], states: dict[str, Any], model: GPT, optimizer: Any
    ) -> dict[str, Any]:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import set_state_dict

        found = {**states, **trained(model, optimizer)}
        try:
            with quiet():
                checkpoint.load(found, checkpoint_id=saved["folder"])
        except (Exception, checkpoint.CheckpointException) as error:  # which is no Exception
            raise UserError(
                f"checkpoint {saved['folder']} is damaged or does not fit: {reason_of(error)}"
            ) from error
        set_state_dict(
            model,
            optimizer,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )
        return {name: found[name] for name in states}


class Ranks(Folders):
    """A rank of torch.distributed's default group.

    Args:
        settings: whose `parallel` is not "none".
    """

    def __init__(self, settings: Settings) -> None:
        import torch.distributed as dist

        self.mode = settings.parallel
        self.device = settings.device
        self.num_ranks = dist.get_world_size()
        self.is_first = dist.get_rank() == 0
        # Ranks that share a layer's matrices work on the same windows.
        sharing = TENSOR_RANKS if self.mode == "fsdp-tp" else 1
        self.num_parts = self.num_ranks // sharing
        self.part = dist.get_rank() // sharing
        if self.mode == "ddp-sharded":
            self.process_group = dist.group.WORLD

    def wrap(self, model: GPT) -> nn.Module:
        if self.mode in ("ddp", "ddp-sharded"):
            return nn.parallel.DistributedDataParallel(model)
        shard(model, self.mode, self.device, self.num_ranks)
        return model

    def ready(self, optimizer: Any) -> None:
        if hasattr(optimizer, "diagnostics"):  # DyKAF's
            import dykaf

            plan = dykaf.describe_plan(optimizer)  # of all ranks together
            if self.is_first:
                print(f"{self.mode} on {plan}")

    def part_of(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.chunk(self.num_parts)[self.part]

    def mean(self, value: float) -> float:
        return self._reduced(value, "SUM") / self.num_ranks

    def agreed(self, received: int | None) -> int | None:
        return int(self._reduced(received or 0, "MAX")) or None

    def barrier(self) -> None:
        self._reduced(0, "MAX")

    def _reduced(self, value: float, operation: str) -> float:
        import torch.distributed as dist

        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor.item()


def shard(model: GPT, mode: str, device: str, num_ranks: int) -> None:
    """Makes the parameters DTensors: FSDP2 on each block and on the rest, after the tensor plan."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mode == "fsdp":
        mesh = init_device_mesh(device, (num_ranks,))
    elif mode == "hsdp":
        mesh = init_device_mesh(
            device, (REPLICAS, num_ranks // REPLICAS), mesh_dim_names=("replicate", "shard")
        )
    else:
        both = init_device_mesh(
            device, (num_ranks // TENSOR_RANKS, TENSOR_RANKS), mesh_dim_names=("data", "tensor")
        )
        split_matrices(model, both["tensor"])
        mesh = both["data"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_matrices(model: GPT, mesh: Any) -> None:
    """Tensor parallelism, with the positions of a window split between the matrices.

    The rows of qkv are those of q, k and v one after the other, so that half of them are no whole
    heads: its output is gathered, and attention itself is computed on each rank.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    # The logits are a view, which nothing changes in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    positions, whole = Shard(1), Replicate()
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=positions),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=positions, output_layouts=whole),
    }
    block = {
        "norm_attention": SequenceParallel(),
        "attention.qkv": ColwiseParallel(input_layouts=positions, output_layouts=whole),
        "attention.out": RowwiseParallel(input_layouts=whole, output_layouts=positions),
        "norm_mlp": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=positions),
        "down": RowwiseParallel(output_layouts=positions),
    }
    for index in range(len(model.blocks)):
        plan |= {f"blocks.{index}.{name}": style for name, style in block.items()}
    parallelize_module(model, mesh, plan)


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[Alone]:
    """What a run needs of its ranks; in the default group that torchrun describes, for its time.

    Raises:
        UserError: there is no GPU for this rank.
    """
    if settings.parallel == "none":
        yield Alone()
        return
    import torch.distributed as dist

    local_rank = int(os.environ["LOCAL_RANK"])
    if settings.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--device cuda: a rank needs a GPU of its own, this torch sees "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if settings.device == "cuda" else "gloo")
    try:
        yield Ranks(settings)
    finally:
        dist.destroy_process_group()


def trained(model: GPT, optimizer: Any) -> dict[str, Any]:
    """State of model and optimizer under the parameters' names, as torch.distributed has it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    if hasattr(optimizer, "consolidate_state_dict"):  # DyKAF's
        # With a process group, each rank's state_dict() then has all of the state.
        optimizer.consolidate_state_dict(to=None)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def folders_in(path: Path) -> list[Path]:
    """The whole checkpoints in a folder, by step."""
    found = [folder for folder in path.glob("step-*") if folder.name[5:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def reason_of(error: BaseException) -> str:
    """A line for an exception; for those of many ranks that of the first one."""
    for _, (inner, _) in sorted(getattr(error, "failures", {}).items()):
        return reason_of(inner)
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that a process without a group saves or loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
