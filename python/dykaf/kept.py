"""The step of parameters that are as they were at the step before: nothing is read or checked anew.

A step has much to learn of each parameter: its name, layout, state, place in the refresh period.
While gradients, options and learning rates are all that changes, it need not learn it again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dykaf import ops
from dykaf.options import StepOptions, check_options, rules_of, step_options
from dykaf.schedule import PLANNED_OPTIONS
from dykaf.state import State
from dykaf.work import GroupWork


class Kept:
    """The jobs of a step, as addresses; no tensor is kept alive.

    Args:
        jobs: of the step that was done; :meth:`dykaf.ops.Jobs.keep` has kept them.
        work: of that step, an item for each job.
        param_groups: the optimizer's.
    """

    def __init__(
        self,
        jobs: ops.Jobs,
        work: Sequence[GroupWork],
        param_groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self.work = [item.without_tensors() for item in work]
        self.runs = [item.runs() for item in work]
        self._jobs = jobs
        self._groups = list(param_groups)
        self._values = [_values(group) for group in param_groups]
        self._planned = [_planned(group) for group in param_groups]
        self._options: dict[int, StepOptions] = {}  # by the id of a group

    @classmethod
    def of(
        cls,
        jobs: ops.Jobs,
        work: Sequence[GroupWork],
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, State],
    ) -> Kept | None:
        """What is kept of a step; None where its jobs take more than addresses."""
        places = [[entry.index for entry in item.entries] for item in work]
        if not jobs.keep(_params(param_groups), states, places):
            return None
        return cls(jobs, work, param_groups)

    def grad_maxima(
        self, param_groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, State]
    ) -> list[Tensor] | None:
        """The largest magnitudes of each job's new gradients; None if more has changed than these.

        Raises:
            ValueError: for an option that cannot be used.
        """
        if len(param_groups) != len(self._groups):
            return None
        for idx, group in enumerate(param_groups):
            if group is not self._groups[idx]:
                return None
            values = _values(group)
            if all(map(operator.is_, values, self._values[idx])):
                continue
            check_options(group)
            if _planned(group) != self._planned[idx]:
                return None
            self._values[idx] = values
            self._options.clear()
        if not self._options and not self._are_together():
            return None
        return self._jobs.grad_max(_params(param_groups), states)

    def _are_together(self) -> bool:
        """Whether the groups of each item still differ in rates alone."""
        pairs = zip(self.work, self.runs, strict=True)
        return all(item.takes(group) for item, runs in pairs for group, _ in runs)

    def options_of(self, item: GroupWork) -> StepOptions:
        """The options of an item, but for the learning rate and the gradients' scale."""
        key = id(item.group)
        if key not in self._options:
            self._options[key] = step_options(item.group, lr=0.0)
        return self._options[key]

    def run(self, inputs: Sequence[ops.StepInputs]) -> ops.StepReport:
        """The step with the gradients whose maxima were asked for."""
        return self._jobs.run_again(inputs)

    def let_go(self) -> None:
        """Lets go of the gradients of a step that is skipped."""
        self._jobs.let_go()


def _values(group: Mapping[str, Any]) -> list[Any]:
    return [group[name] for name in rules_of(group)]


def _planned(group: Mapping[str, Any]) -> list[Any]:
    return [group[name] for name in PLANNED_OPTIONS]


def _params(param_groups: Sequence[Mapping[str, Any]]) -> list[list[Tensor]]:
    return [group["params"] for group in param_groups]
