"""How an optimizer is saved and loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dykaf.checkpoint import checked_state_dict, exact_states
from dykaf.distributed.alone import Alone
from dykaf.nonfinite import Skips
from dykaf.options import plain_options, rules_of
from dykaf.state import State, host_entries_
from dykaf.work import Waiting


class Saved(Optimizer):
    """The part of :class:`dykaf.DyKAF` that saves and loads."""

    amp_scaling: bool
    _skips: Skips
    _waiting: Waiting
    _sharing: Alone
    _incoming: dict[str, Any] | None  # the state_dict that is being loaded
    _arriving: dict[Tensor, State]  # its states

    def _prepare(
        self,
        groups: Sequence[dict[str, Any]] | None = None,
        loaded: Collection[Tensor] | None = None,
    ) -> Alone:
        """How processes share the parameters now."""
        raise NotImplementedError

    def _reset_caches(self) -> None:
        """Forgets what was worked out from groups that a load replaces."""
        raise NotImplementedError  # DyKAF has both

    @property
    def skipped_steps(self) -> int:
        """The steps that changed nothing because of a NaN or an infinity; waits for the GPU."""
        return self._skips.total()

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skips.reset(value)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer; loads with ``weights_only=True``.

        Each group has the entry ``skipped_steps``, the count of the whole optimizer: entries of
        groups are all that torch.distributed.checkpoint keeps beside the state.

        With sharded parameters all ranks call it together. State of DTensors is then DTensors,
        which :mod:`torch.distributed.checkpoint` saves, and loads on any number of ranks.

        Raises:
            RuntimeError: with a ``process_group``, without :meth:`consolidate_state_dict` before.
        """
        # Without state nothing is to be gathered, and a rank may be alone here.
        sharing = self._prepare() if self.state else self._sharing
        params = [param for group in self.param_groups for param in group["params"]]
        # Pre-hook: registered last, so that it sees what other pre-hooks made of the optimizer.
        # Post-hook: first, so that others see what is saved.
        handles = [
            self.register_state_dict_pre_hook(lambda _: self._tidy()),
            self.register_state_dict_post_hook(
                lambda _, saved: sharing.at_rest(saved, params), prepend=True
            ),
        ]
        try:
            return super().state_dict()
        finally:
            for handle in handles:
                handle.remove()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """With a ``process_group``: gathers the state for :meth:`state_dict`.

        All ranks of the group call it together. Without a group there is nothing to gather.

        Args:
            to: the rank in the group whose ``state_dict()`` has all of it then, until the next
                step; None: that of every rank, which gathers by itself from now on and is to be
                called by all together, as :mod:`torch.distributed.checkpoint` does.
        """
        self._prepare().consolidate(to)

    def _tidy(self) -> None:
        """Brings what users and schedulers may have left into the form that is saved."""
        self._waiting.settle()
        skipped_steps = self.skipped_steps
        for group in self.param_groups:
            group.update(plain_options(group), skipped_steps=skipped_steps)
        for state in self.state.values():
            host_entries_(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state exactly: unlike torch's own, without a cast to the parameters' dtypes.

        Raises:
            ValueError: for state that does not fit the parameters and options, naming the
                parameter and tensor; the optimizer is as it was.
        """

        def prepare(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            checked = checked_state_dict(loaded, self.param_groups)
            self._arriving = self._arrived(checked)
            self._incoming = checked
            return checked

        # Registered last, so that it sees what other pre-hooks made of the state_dict.
        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._incoming, self._arriving = None, {}

    def _arrived(self, checked: dict[str, Any]) -> dict[Tensor, State]:
        """The states of a checked state_dict as this process keeps them; changes nothing."""
        sizes, saved_sizes = (
            [len(group["params"]) for group in groups]
            for groups in (self.param_groups, checked["param_groups"])
        )
        if sizes != saved_sizes:
            return {}  # torch refuses it
        pairs = list(zip(self.param_groups, checked["param_groups"], strict=True))
        groups = [{**saved, "params": group["params"]} for group, saved in pairs]
        saved_of = {
            param: checked["state"].get(place)
            for group, saved in pairs
            for param, place in zip(group["params"], saved["params"], strict=True)
        }
        loaded = {param: state for param, state in saved_of.items() if state}
        return exact_states(loaded, self._prepare(groups, loaded))

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "skipped_steps": self.skipped_steps,
            "amp_scaling": self.amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped_steps = state.get("skipped_steps")
        if not hasattr(self, "_skips"):  # of a pickled optimizer
            self._skips = Skips()
        super().__setstate__({key: state[key] for key in state if key != "skipped_steps"})
        if skipped_steps is not None:
            self.skipped_steps = skipped_steps
        self._reset_caches()
        for group in self.param_groups:
            group.setdefault("skipped_steps", 0)
            for name in rules_of(self.defaults):
                group.setdefault(name, self.defaults[name])
        incoming = getattr(self, "_incoming", None)
        if incoming is not None:
            # In place of what torch has cast to the parameters' dtypes.
            self.state.update(self._arriving)
            self.skipped_steps = incoming["skipped_steps"]
