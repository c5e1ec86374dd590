"""A step of one process, in the form that a step of many has."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dykaf.distributed import is_dtensor
from dykaf.state import State
from dykaf.work import Entry, GroupWork

if TYPE_CHECKING:
    import torch.distributed as dist

    from dykaf.distributed.plan import Spread


class Part:
    """What is worked on at one time; a context in which it is."""

    def __init__(self, work: list[GroupWork], maxima: list[Tensor]) -> None:
        self.work = work
        self.maxima = maxima  # of each item's gradients

    def note_failed(self, entries: Sequence[Entry]) -> None:
        """Hears of entries that could not be updated."""

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        return self.end(exception)

    def end(self, exception: BaseException | None) -> bool:
        """After the work, or what stopped it; True for an exception that is told of later."""
        return False


class Alone:
    """No parameter is sharded: a step has one part."""

    is_shared = False

    def prepare(
        self,
        param_groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, State],
        loaded: Collection[Tensor] | None = None,
    ) -> None:
        """Before a step, a save or a load: brings the plan up to date.

        Args:
            param_groups: of the optimizer.
            states: of its parameters.
            loaded: the parameters that get state from a checkpoint instead.
        """

    def release(self) -> None:
        """Lets go of what a step has held."""

    def of(self, param: Tensor) -> Spread | None:
        """How a parameter is spread; None where this process has it alone."""
        return None

    def take(self, param: Tensor) -> None:
        """Takes part of a sharded parameter in the step."""

    def agree(self, flags: Sequence[int]) -> list[int]:
        """The largest of each flag over all ranks."""
        return list(flags)

    def parts(self, work: list[GroupWork], maxima: list[Tensor]) -> Iterator[Part]:
        """Cuts a step into parts, in turn."""
        yield Part(work, maxima)

    def describe(self) -> str:
        """Who works on what."""
        return "1 process: no parameter is sharded"

    def consolidate(self, to: int | None) -> None:
        """Gathers the state of parameters that are shared over a group."""

    def at_rest(self, state_dict: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
        """A state_dict with the state of sharded parameters as it is saved.

        Args:
            state_dict: with what this rank has.
            params: in their order.
        """
        return state_dict

    def at_work(self, states: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[Tensor, State]:
        """What this rank keeps of the saved states of sharded parameters."""
        return {}

    def failed(self) -> tuple[list[str], Exception | None]:
        """The names of parameters that the step could not update, and why, if this rank knows."""
        return [], None


def sharing_of(
    before: Alone,
    param_groups: Sequence[Mapping[str, Any]],
    process_group: dist.ProcessGroup | None,
) -> Alone:
    """How the processes share the parameters of an optimizer.

    Args:
        before: what it was at the last step.
        param_groups: of the optimizer.
        process_group: over which plain parameters are shared.
    """
    if before.is_shared:
        return before
    if process_group is None and not any(
        is_dtensor(param) for group in param_groups for param in group["params"]
    ):
        return before
    from dykaf.distributed.together import Together

    return Together(process_group)
