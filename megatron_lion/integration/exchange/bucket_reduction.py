"""The compressed reduce-scatter of one bucket of Megatron's gradient buffers."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_lion.exchange.blocks import Residual
from megatron_lion.exchange.pieces import PieceFormat, sum_exact_, write_exact_
from megatron_lion.integration import compat
from megatron_lion.integration.exchange.levels import Levels
from megatron_lion.kernels.reduce import ReduceKernels


class Sample(NamedTuple):
    """What was measured before a reduction."""

    gradient: Tensor
    """sum of squares of this rank's gradient of the other ranks' shards, without exact elements: fp64, no dimensions"""
    exact: Tensor | None
    """the uncompressed sum of this rank's shard, fp32, where it was asked for"""


class BucketReduction:
    """Reduces one bucket's gradient in packed blocks, and keeps the residuals.

    Three kinds of parameters are sent unchanged: 1-D parameters, parameters with a gradient that Megatron reduces a
    second time, and those in ``exact``. This rank's own shard is not sent.

    Args:
        bucket: Megatron's. Each data-parallel rank owns an equal piece of its ``grad_data``, the shard.
        starts: where the bucket has each of its parameters.
        levels: the data-parallel ranks, in the order of their shards. On two levels, ranks of a node reduce as Megatron
            does, and what is packed is the sum of a node.
        kernels: how blocks are written and summed.
        code: one of :data:`megatron_lion.exchange.blocks.CODES`.
        feedback: the form of the residual: "int8", "bf16" or "none".
        exact: further parameters that are sent unchanged.
    """

    def __init__(
        self,
        bucket: Any,
        starts: dict[torch.nn.Parameter, int],
        levels: Levels,
        kernels: ReduceKernels,
        *,
        code: str,
        feedback: str,
        exact: Collection[torch.nn.Parameter] = (),
    ) -> None:
        self.bucket, self.levels, self.kernels, self.code = bucket, levels, kernels, code
        self.group = levels.outer
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.numel = bucket.grad_data.numel() // levels.whole.size()
        self._of_node: Tensor | None = None
        unpacked = {param for param in starts if param.dim() < 2 or compat.is_reduced_again(param)}
        self.exact_params = unpacked.union(exact)
        spans = sorted((starts[param], starts[param] + param.numel()) for param in self.exact_params)
        dtype = bucket.grad_data.dtype
        self.forms = [PieceFormat(code, self.numel, dtype, tuple(self._in_shard(spans, n))) for n in levels.shards]
        self.is_compressed = len(self.exact_params) < len(starts)
        keeps = self.is_compressed and feedback != "none"
        device = bucket.grad_data.device
        self.residuals = {rank: Residual.zeros(feedback, self.numel, device) for rank in self.others if keeps}
        """for each other rank: its residual, in the units of the gradient buffer"""
        self.sampling: str | None = None
        """what the next reduction measures: None, "norm" or "exact" """
        self.sample: Sample | None = None
        self.awaits_step = False
        """Whether no step has used the last reduction yet."""
        self.was_repeated = False
        """Whether a reduction came before a step had used the one before, so that the residuals were dropped."""
        self._is_mean = False

    @property
    def others(self) -> list[int]:
        """All ranks but this one, ascending."""
        return [rank for rank in range(self.ranks) if rank != self.rank]

    @property
    def sent_sizes(self) -> list[int]:
        """Bytes of the message to each rank, none for this one."""
        return [0 if rank == self.rank else self.forms[rank].nbytes for rank in range(self.ranks)]

    def shard(self, rank: int) -> Tensor:
        """This rank's gradient, or its node's, of the shard of ``rank``."""
        flat: Tensor = self.bucket.grad_data.view(-1) if self._of_node is None else self._of_node
        return flat[rank * self.numel : (rank + 1) * self.numel]

    @property
    def owned(self) -> Tensor:
        """This rank's shard in ``grad_data``."""
        flat: Tensor = self.bucket.grad_data.view(-1)
        return flat.view(-1, self.numel)[self.levels.shards[self.rank]]

    @torch.no_grad()
    def start(self, op: Any, *, async_op: bool) -> "Pending":
        """Send the gradient of the other shards to their owners, and keep the residuals.

        Issues one all-to-all of packed bytes, after a reduce-scatter inside the node on two levels, or Megatron's
        reduce-scatter if every parameter is exact. Modifies the exact elements of other shards in ``grad_data``, which
        hold nothing of use after a reduce-scatter. If the backward pass is repeated before a step, what was sent first
        is thrown away, so the residuals of it are too.
        """
        if not self.is_compressed:
            work = torch.distributed.reduce_scatter_tensor(
                self.owned, self.bucket.grad_data, op=op, group=self.levels.whole, async_op=async_op
            )
            return Pending(self, work, None, None, op)
        if self.awaits_step:
            self.clear()
            self.was_repeated = True
        self.awaits_step, self._is_mean = True, op == ReduceOp.AVG
        exact = self._exact_sum(op) if self.sampling == "exact" else None
        if self.levels.inner is not None:
            self._of_node = self._sum_in_node(op)
        sent = self.pack(exact)
        mine = self.forms[self.rank].nbytes
        received = sent.new_empty(len(self.others), mine)
        expected = [0 if rank == self.rank else mine for rank in range(self.ranks)]
        work = torch.distributed.all_to_all_single(
            received.view(-1), sent, expected, self.sent_sizes, group=self.group, async_op=async_op
        )
        return Pending(self, work, sent, received, op)

    @torch.no_grad()
    def pack(self, exact: Tensor | None = None) -> Tensor:
        """Return the messages to all ranks, uint8 [sum of sent_sizes], and keep the residuals.

        Moves the exact elements of other shards out of ``grad_data``. If a sample is due, it has ``exact``.
        """
        sent = torch.empty(sum(self.sent_sizes), dtype=torch.uint8, device=self.bucket.grad_data.device)
        messages = torch.split(sent, self.sent_sizes)
        for rank in self.others:
            write_exact_(messages[rank], self.shard(rank), self.forms[rank])
        if self.sampling is not None:
            norms = torch._foreach_norm([self.shard(rank).float() for rank in self.others])
            self.sample = Sample(torch.stack(norms).double().square().sum(), exact)
            self.sampling = None
        for rank in self.others:
            self.kernels.write_blocks_(messages[rank], self.shard(rank), self.residuals.get(rank), self.forms[rank])
        return sent

    @torch.no_grad()
    def receive(self, messages: Tensor, op: Any) -> None:
        """Replace this rank's shard in ``grad_data`` by the sum over all ranks, or their mean."""
        own, form = self.shard(self.rank), self.forms[self.rank]
        total = self.kernels.sum_blocks(own, messages, self.rank, form)
        sum_exact_(total, own, messages, self.rank, form)
        self._of_node = None
        self.owned.copy_(total / self.ranks if op == ReduceOp.AVG else total)

    def sum_residuals(self) -> Tensor:
        """The sum over all ranks of the residuals of this rank's shard, fp32 [numel], or their mean if that is how
        gradients are reduced. Issues one reduce for each rank, so that it needs the memory of one shard."""
        device = self.bucket.grad_data.device
        total = torch.zeros(self.numel, device=device)
        for rank, to in enumerate(torch.distributed.get_process_group_ranks(self.group)):
            left = total if rank == self.rank else self.residuals[rank].values(self.numel)
            torch.distributed.reduce(left, to, group=self.group)
        return total / self.ranks if self._is_mean else total

    def scale_(self, factor: float) -> None:
        """Multiply the residuals by ``factor``, and the gradient of a sample too."""
        for residual in self.residuals.values():
            residual.scale_(factor)
        if self.sample is not None:
            self.sample = self.sample._replace(gradient=self.sample.gradient * factor**2)

    def clear(self) -> None:
        """Set the residuals to zero."""
        for residual in self.residuals.values():
            residual.zero_()

    def _exact_sum(self, op: Any) -> Tensor:
        whole = self.bucket.grad_data.view(-1).float()
        total = torch.empty_like(self.owned, dtype=torch.float32)
        torch.distributed.reduce_scatter_tensor(total, whole, op=op, group=self.levels.whole)
        return total

    def _sum_in_node(self, op: Any) -> Tensor:
        """This node's gradient of the shards of ``group``. Issues one reduce-scatter inside the node."""
        in_node = self.levels.inner
        by_shard = self.bucket.grad_data.view(self.ranks, in_node.size(), self.numel)
        total = torch.empty_like(by_shard[:, 0]).view(-1)
        torch.distributed.reduce_scatter_tensor(total, by_shard.transpose(0, 1).reshape(-1), op=op, group=in_node)
        return total

    def _in_shard(self, spans: list[tuple[int, int]], rank: int) -> Iterator[tuple[int, int]]:
        """The parts of ``spans`` of the bucket in the shard of ``rank``, counted from its start, joined."""
        first, last = None, 0
        for start, stop in spans:
            start, stop = max(start - rank * self.numel, 0), min(stop - rank * self.numel, self.numel)
            if start >= stop:
                continue
            if first is not None and start != last:
                yield first, last
                first = None
            first, last = start if first is None else first, stop
        if first is not None:
            yield first, last


class Pending(NamedTuple):
    """A reduction under way. It keeps what is sent until the others have it."""

    reduction: BucketReduction
    work: Any
    sent: Tensor | None
    received: Tensor | None
    op: Any

    def finish(self) -> None:
        """Wait for the messages and sum them."""
        if self.work is not None:
            self.work.wait()
        if self.received is not None:
            self.reduction.receive(self.received, self.op)
