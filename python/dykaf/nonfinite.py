"""What gradients that are not finite do to a step, and how the user hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dykaf.checks import warn
from dykaf.work import GroupWork, to_host

# Of those that a gradient which is not finite meets, in the order of their flags.
POLICIES = ("raise", "skip")
# What ranks compare: a flag for each policy, GradScaler's verdict, and input that a rank refuses.
REFUSED = (0, 0, 0, 1)


def culprit_flag(index: int) -> int:
    """The flag of a parameter whose gradient is not finite: larger for an earlier one, 0: none.

    It is its own inverse.
    """
    return 2**30 - index


def must_skip(
    work: Sequence[GroupWork],
    maxima: Sequence[Tensor],
    found_inf: Tensor | None,
    agree: Callable[[Sequence[int]], list[int]],
    name_of: Callable[[int], str],
) -> tuple[bool, str | None]:
    """Whether to skip the step, and a parameter whose gradient is why; waits for every device.

    Args:
        work: of the step.
        maxima: of each item's gradients, NaN where one is not finite.
        found_inf: GradScaler's verdict.
        agree: gives the largest of each flag over all ranks.
        name_of: of a parameter, by its place in the optimizer.

    Raises:
        RuntimeError: naming a parameter, where the group's policy is "raise".
    """
    flags = [0, 0, int(found_inf is not None and bool(found_inf > 0)), 0]
    for item, grad_max in zip(work, maxima, strict=True):
        policy = item.group["nonfinite"]
        if policy in POLICIES and not bool(grad_max.isfinite().all()):
            culprit = item.owner(grad_max.isfinite().tolist().index(False))
            place = POLICIES.index(policy)
            flags[place] = max(flags[place], culprit_flag(culprit.index))
    raising, skipping, was_found, was_refused = agree(flags)
    if was_refused:
        raise RuntimeError("step: another rank refused its input, see there; nothing has changed")
    if was_found:
        return True, None
    if raising:
        raise RuntimeError(
            f"gradient of {name_of(culprit_flag(raising))}: expected finite values, got NaN or "
            "infinity (nonfinite='raise'); nothing has changed"
        )
    return skipping > 0, name_of(culprit_flag(skipping)) if skipping else None


class Skips:
    """Counts the steps that are skipped, on the CPU and without waiting on a GPU, and warns.

    It warns of the first one, and again when the steps skipped in a row are ten times as many as at
    the last warning: a run whose gradients are all NaN would end normally otherwise.
    """

    def __init__(self) -> None:
        self.on_host = 0
        self.on_gpu: Tensor | None = None  # int64 [2]: all, and those in a row
        self._in_row = 0
        self._warn_at = 1
        # A copy on the host of those in a row and, of each item, the first matrix that is not
        # finite or -1; when it is there; the items.
        self._news: tuple[Tensor, torch.cuda.Event | None, list[GroupWork]] | None = None

    def total(self) -> int:
        """Waits for the GPU."""
        return self.on_host + (0 if self.on_gpu is None else int(self.on_gpu[0]))

    def reset(self, total: int) -> None:
        """Sets the count of all."""
        self.on_host = total
        if self.on_gpu is not None:
            self.on_gpu.zero_()  # in place: captured steps add to it

    def count(self, is_skipped: bool, culprit: str | None) -> None:
        """Counts a step on the CPU; without a culprit it was GradScaler that skipped it."""
        self._in_row = self._in_row + 1 if is_skipped else 0
        self.on_host += is_skipped
        if culprit is not None:
            self._warn(self._in_row, culprit)

    def flag(
        self, work: Sequence[GroupWork], maxima: Sequence[Tensor], found_inf: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Whether to skip the step, and what :meth:`count_on_gpu` takes; no host has waited."""
        watched = [
            (grad_max.isfinite().logical_not(), item)
            for item, grad_max in zip(work, maxima, strict=True)
            if item.group["nonfinite"] == "skip"
        ]
        flags = [bad.any() for bad, _ in watched]
        if found_inf is not None:
            flags.append((found_inf > 0).any())
        if not flags:
            return None, None
        device = flags[0].device
        skip = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()
        firsts = [torch.where(bad.any(), bad.int().argmax(), -1) for bad, _ in watched]
        if not firsts:
            return skip, None
        return skip, torch.stack([first.to(device, non_blocking=True) for first in firsts])

    def count_on_gpu(
        self, skip: Tensor, firsts: Tensor | None, work: Sequence[GroupWork], captured: bool
    ) -> None:
        """Counts a step by its flag."""
        if self.on_gpu is None:
            with torch.inference_mode(False):
                self.on_gpu = torch.zeros(2, dtype=torch.int64, device=skip.device)
        skip = skip.to(self.on_gpu.device, non_blocking=True)
        self.on_gpu += skip
        self.on_gpu[1] *= skip
        if captured or firsts is None or self._news is not None:
            return  # no news, or the last ones are still under way
        firsts = firsts.to(self.on_gpu.device, non_blocking=True)
        news = torch.cat([self.on_gpu[1:], firsts])
        items = [item.without_tensors() for item in work if item.group["nonfinite"] == "skip"]
        self._news = (*to_host(news), items)

    def hear(self) -> None:
        """Warns of what has come from the GPU since; waits for nothing."""
        if self._news is None:
            return
        news, event, items = self._news
        if event is not None and not event.query():  # type: ignore[no-untyped-call]  # torch
            return
        self._news = None
        in_row, *firsts = news.tolist()
        for first, item in zip(firsts, items, strict=True):
            if first >= 0:
                self._warn(in_row, item.owner(first).name)
                return

    def _warn(self, in_row: int, name: str) -> None:
        if in_row < self._warn_at:
            return
        self._warn_at = 10 * in_row
        warn(
            f"gradient of {name}: NaN or infinity; the step was skipped, as were the "
            f"{in_row - 1} before it (nonfinite='skip', see optimizer.skipped_steps)"
        )
