"""Megatron's bucket groups, with a ``start_grad_sync`` that reduces gradients in packed blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer

from megatron_lion.integration import compat
from megatron_lion.integration.exchange.bucket_groups import SignBucketGroup
from megatron_lion.integration.exchange.bucket_reduction import BucketReduction, Pending


class ReducingBucketGroup(_ParamAndGradBucketGroup):
    """A bucket group of the distributed optimizer that sends packed gradients. Made from Megatron's by
    :func:`convert`."""

    reductions: list[BucketReduction]
    compresses: bool
    """Whether gradients are compressed. False leaves the reduction to Megatron, and the residuals as they are."""

    @compat.overrides
    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Reduce the gradients, or start to where Megatron overlaps it with the backward pass.

        Issues one all-to-all for each bucket that has compressed parameters.
        """
        if force_all_reduce or not self.compresses:
            super().start_grad_sync(force_all_reduce)
            return
        ops: list[Any] = []
        # Megatron's method checks and scales the gradients. It calls the reduction inside a coalescing manager, which
        # does not wait for an all-to-all, so ours begins after it.
        with compat.reducing_with(lambda output, gradient, op, group, async_op: ops.append(op)):
            super().start_grad_sync(force_all_reduce)
        if not ops:  # it is under way already
            return
        overlaps = self.ddp_config.overlap_grad_reduce
        reductions = zip(self.reductions, ops, strict=True)
        handle = ReduceHandle([reduction.start(op, async_op=overlaps) for reduction, op in reductions])
        if overlaps:
            compat.finish_reduction_with(self, handle)
        else:
            handle.wait()


class SignAndReducingBucketGroup(SignBucketGroup, ReducingBucketGroup):
    """A bucket group that sends packed gradients before a step, and its signs after it."""


class ReduceHandle:
    """Reductions of a group that are under way."""

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = list(pending)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the messages and sum them on the current stream."""
        pending, self._pending = self._pending, []
        for reduction in pending:
            reduction.finish()


class ScaledBuffer(_ParamAndGradBuffer):
    """A gradient buffer that remembers by what it was scaled after the last reduction: by 1/tokens for per-token
    losses."""

    scaled_by: Any

    @compat.overrides
    def scale_gradients(self, scaling_factor: Any) -> None:
        """Multiply the gradients by ``scaling_factor``."""
        self.scaled_by = scaling_factor
        super().scale_gradients(scaling_factor)


def convert(group: Any, reductions: Sequence[BucketReduction]) -> ReducingBucketGroup:
    """Let Megatron's ``group`` use ``reductions``, one for each of its buckets."""
    group.__class__ = SignAndReducingBucketGroup if isinstance(group, SignBucketGroup) else ReducingBucketGroup
    group.reductions, group.compresses = list(reductions), True
    converted: ReducingBucketGroup = group
    return converted


def convert_buffer(buffer: Any) -> None:
    """Let Megatron's ``buffer`` remember its last scale."""
    buffer.__class__, buffer.scaled_by = ScaledBuffer, 1.0
