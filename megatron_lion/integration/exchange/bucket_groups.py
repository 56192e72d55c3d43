"""Megatron's bucket groups, with a ``start_param_sync`` that gathers the signs of a step.

A gather may be made twice, a replay must be made exactly once for each step. So the group decides, not its callers:

=========  ================================================  ========================================================
state      set by                                            ``start_param_sync``
=========  ================================================  ========================================================
``CLEAN``  a replay or a full gather of a step               does nothing
``SIGNS``  a step, if the state before it was CLEAN          gathers the messages and replays them
``STALE``  the start, a load, a mismatch, a refresh          is Megatron's: gathers the parameters, and changes no
                                                             state
``FULL``   a step after STALE, or with too many exceptions   is Megatron's: gathers the parameters
=========  ================================================  ========================================================

A skipped step changes no state. What is pending is sent before the next step.

A replay starts from the parameters that a rank has, a step from the owner's masters. After a load the two may differ.
A gather before the step does not change that, so the step after a load is always gathered in full.
"""

import enum
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_lion.integration import compat
from megatron_lion.integration.exchange.bucket_signs import BucketSigns, Gathered


class State(enum.Enum):
    """What the next synchronization of a group has to do."""

    CLEAN = "nothing"
    SIGNS = "send the signs of the last step"
    STALE = "send the parameters, now and after the next step"
    FULL = "send the parameters of the last step"


class SignBucketGroup(_ParamAndGradBucketGroup):
    """A bucket group of the distributed optimizer that sends signs. Made from Megatron's by :func:`convert`."""

    state: State
    signs: list[BucketSigns]
    full_gathers: int
    """of steps"""

    @compat.overrides
    def start_param_sync(self, force_sync: bool = False) -> None:
        """Bring the parameters of all ranks up to date, or start to where Megatron overlaps it with the forward pass.

        Issues one all-gather for each bucket, or for each part of a shard in signs, or none.
        """
        if self.param_gather_handle is not None:  # it waits, or raises
            super().start_param_sync(force_sync)
        elif self.state in (State.STALE, State.FULL):
            super().start_param_sync(force_sync)
            self.full_gathers += self.state is State.FULL
        elif self.state is State.SIGNS and self.ddp_config.overlap_param_gather and not force_sync:
            compat.gather_is_dispatched(self, self._send_signs())
        else:
            self._send_pending_signs()
            compat.gather_is_dispatched(self)
        if self.state is not State.STALE:
            self.state = State.CLEAN

    def settle(self) -> None:
        """Finish what the last step left, before the next one: where a module was not run, for example."""
        compat.wait_for_gather(self)
        self._send_pending_signs()

    def require_full(self, state: State = State.STALE) -> None:
        """Send the parameters in full from now on, and after the next step; with FULL only after the last step.

        Signs that were not sent are dropped.
        """
        compat.wait_for_gather(self)
        for signs in self.signs:
            signs.drop()
        self.state = state

    def _send_pending_signs(self) -> None:
        if self.state is State.SIGNS:
            self._send_signs().wait()
            self.state = State.CLEAN

    def _send_signs(self) -> "ReplayHandle":
        return ReplayHandle([signs.gather() for signs in self.signs])


class ReplayHandle:
    """Messages of a group that are being gathered. Waiting replays them, once."""

    def __init__(self, gathered: Sequence[Gathered]) -> None:
        self._gathered: list[Gathered] = list(gathered)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the messages and replay them on the current stream."""
        gathered, self._gathered = self._gathered, []
        for messages in gathered:
            messages.replay()


def convert(group: Any, signs: Sequence[BucketSigns]) -> SignBucketGroup:
    """Let Megatron's ``group`` send ``signs``, one for each of its buckets. It begins with full gathers."""
    group.__class__ = SignBucketGroup
    group.state, group.signs, group.full_gathers = State.STALE, list(signs), 0
    converted: SignBucketGroup = group
    return converted
