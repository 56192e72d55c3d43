"""The digits, the message and the replay of one bucket of Megatron's parameter buffers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.message import Run, WireFormat
from megatron_lion.kernels.exchange import ExchangeKernels

CAPACITY_STEP = 64  # capacities are multiples of it, so that messages have few different sizes


class Span(NamedTuple):
    """Elements ``start`` to ``stop`` of a bucket, which the parameter group of number ``group`` updates."""

    start: int
    stop: int
    group: int


class BucketSigns:
    """Sends one bucket's parameters as the signs of a step.

    Args:
        bucket: Megatron's. Each data-parallel rank owns an equal piece of its ``param_data``, the shard.
        spans: where the bucket has parameters, in ascending order.
        group: the data-parallel ranks, in the order of their shards.
        kernels: how digits are packed and replayed.
        half_away: whether the parameters are rounded half away from zero.
    """

    def __init__(
        self, bucket: Any, spans: Sequence[Span], group: Any, kernels: ExchangeKernels, *, half_away: bool
    ) -> None:
        self.bucket = bucket
        self.spans = list(_joined(spans))
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self.numel = bucket.param_data.numel() // self.ranks
        self.kernels = kernels
        self._half_away = half_away and bucket.param_data.dtype == torch.bfloat16
        self._digits: Tensor | None = None
        self._message: tuple[Tensor, WireFormat, list[Run]] | None = None
        self.mismatches: Tensor | None = None
        """int64 [ranks], of the last replay: not 0 where a shard differs from its owner's."""

    @property
    def params(self) -> Tensor:
        """The parameters of all shards, flattened."""
        return self.bucket.param_data.detach().view(-1)

    @property
    def shard(self) -> Tensor:
        """This rank's own parameters."""
        return self.params[self.rank * self.numel : (self.rank + 1) * self.numel]

    def begin_step(self) -> None:
        """Make digits of zeros, which the step of this rank's shard is to write."""
        self._digits = torch.zeros(self.numel, dtype=torch.uint8, device=self.params.device)

    def digits(self, start: int, stop: int) -> Tensor:
        """The digits, uint8, of elements ``start`` to ``stop`` of the bucket, which are in this rank's shard."""
        assert self._digits is not None
        first = self.rank * self.numel
        return self._digits[start - first : stop - first]

    def count_exceptions(self) -> Tensor:
        """The number of elements that the digits cannot express: int64 without dimensions."""
        if self._digits is None or self.params.dtype == torch.float32:
            return torch.zeros((), dtype=torch.int64, device=self.params.device)
        return self.kernels.count_exceptions(self._digits)

    def differs(self) -> Tensor:
        """Whether the last replay did not give the owners' parameters: int64 without dimensions."""
        if self.mismatches is None:
            return torch.zeros((), dtype=torch.int64, device=self.params.device)
        return (self.mismatches != 0).any().long()

    def form(self, exceptions: int) -> WireFormat:
        """The format of messages with up to ``exceptions``."""
        capacity = -(-exceptions // CAPACITY_STEP) * CAPACITY_STEP
        return WireFormat(self.params.dtype, self.numel, capacity, self._half_away)

    def write_message(self, rates: Sequence[tuple[float, float]], form: WireFormat) -> None:
        """Pack the digits of the step, which had ``rates`` (lr and weight decay) in each parameter group."""
        assert self._digits is not None
        runs = [Run(span.start, span.stop, *rates[span.group]) for span in self.spans]
        message = torch.empty(form.nbytes, dtype=torch.uint8, device=self.params.device)
        self.kernels.write_message_(message, self._digits, self.shard, form)
        self._digits, self._message = None, (message, form, runs)

    def drop(self) -> None:
        """Forget the digits and the message of the last step, and what the last replay found."""
        self._digits = self._message = self.mismatches = None

    def gather(self) -> "Gathered":
        """Start to send the message to the group. Issues one all-gather of ``form.nbytes`` bytes for each rank."""
        assert self._message is not None
        (message, form, runs), self._message = self._message, None
        messages = form.new_messages(self.ranks, message.device)
        work = torch.distributed.all_gather_into_tensor(messages.view(-1), message, group=self.group, async_op=True)
        return Gathered(self, work, messages, form, runs)

    def replay(self, messages: Tensor, form: WireFormat, runs: Sequence[Run]) -> None:
        """Make the step of the other ranks on their shards, in place."""
        self.mismatches = self.kernels.replay_(self.params, messages, runs, form, own=self.rank)


class Gathered(NamedTuple):
    """Messages of a bucket that are being gathered."""

    signs: BucketSigns
    work: Any
    messages: Tensor
    form: WireFormat
    runs: list[Run]

    def replay(self) -> None:
        """Wait for the messages and replay them."""
        self.work.wait()
        self.signs.replay(self.messages, self.form, self.runs)


def _joined(spans: Sequence[Span]) -> Iterator[Span]:
    """``spans`` with neighbors of one group joined. Padding between parameters stays outside: no step changes it."""
    last: Span | None = None
    for span in sorted(spans):
        if last is not None and last[1:] == (span.start, span.group):
            last = last._replace(stop=span.stop)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last
