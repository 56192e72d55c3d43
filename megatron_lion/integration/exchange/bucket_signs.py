"""The digits, the message and the replay of one bucket of Megatron's parameter buffers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.message import CHUNK, Run, WireFormat
from megatron_lion.kernels.exchange import ExchangeKernels

MOST_PARTS = 2  # four hide more of the packing, but fp32 shards, which have the shorter messages, take longer
# Elements. A smaller part is not worth a second collective, or a second launch of each kernel on a GPU.
SMALLEST_PART = {"cpu": 10 * CHUNK, "cuda": 256 * CHUNK}
CAPACITY_STEP = 64  # capacities are multiples of it, so that messages have few different sizes


class Span(NamedTuple):
    """Elements ``start`` to ``stop`` of a bucket, which the parameter group of number ``group`` updates."""

    start: int
    stop: int
    group: int


class BucketSigns:
    """Sends one bucket's parameters as the signs of a step.

    A large shard is sent in parts: while one is on its way, the next one is packed or the one before it is replayed.

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
        self.parts = parts_of(self.numel, SMALLEST_PART[bucket.param_data.device.type])
        self.kernels = kernels
        self._half_away = half_away and bucket.param_data.dtype == torch.bfloat16
        self._digits: Tensor | None = None
        self._pending: tuple[list[WireFormat], list[Run]] | None = None
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
        """The number of elements in each part that the digits cannot express: int64 [parts]."""
        if self._digits is None or self.params.dtype == torch.float32:
            return torch.zeros(len(self.parts), dtype=torch.int64, device=self.params.device)
        return torch.stack([self.kernels.count_exceptions(self._digits[part]) for part in self.parts])

    def differs(self) -> Tensor:
        """Whether the last replay did not give the owners' parameters: int64 without dimensions."""
        if self.mismatches is None:
            return torch.zeros((), dtype=torch.int64, device=self.params.device)
        return (self.mismatches != 0).any().long()

    def forms(self, exceptions: Sequence[int]) -> list[WireFormat]:
        """The format of each part's messages, with up to ``exceptions`` in it."""
        forms = []
        for part, count in zip(self.parts, exceptions, strict=True):
            capacity = -(-count // CAPACITY_STEP) * CAPACITY_STEP
            forms.append(WireFormat(self.params.dtype, part.stop - part.start, capacity, self._half_away))
        return forms

    def prepare(self, rates: Sequence[tuple[float, float]], forms: Sequence[WireFormat]) -> None:
        """Note how the next gather has to send the step. ``rates`` are lr and weight decay of its parameter groups."""
        self._pending = list(forms), [Run(span.start, span.stop, *rates[span.group]) for span in self.spans]

    def drop(self) -> None:
        """Forget the digits of the last step, and what the last replay found."""
        self._digits = self._pending = self.mismatches = None

    def gather(self) -> "Gathered":
        """Pack the last step and start to send it to the group. Issues one all-gather for each part."""
        assert self._digits is not None and self._pending is not None
        (forms, runs), self._pending = self._pending, None
        digits, self._digits = self._digits, None
        return Gathered(self, [self._send(digits, *of_part) for of_part in zip(self.parts, forms, strict=True)], runs)

    def _send(self, digits: Tensor, part: slice, form: WireFormat) -> "SentPart":
        message = torch.empty(form.nbytes, dtype=torch.uint8, device=self.params.device)
        self.kernels.write_message_(message, digits[part], self.shard[part], form)
        messages = form.new_messages(self.ranks, message.device)
        work = torch.distributed.all_gather_into_tensor(messages.view(-1), message, group=self.group, async_op=True)
        return SentPart(work, messages, form, part.start)

    def replay(self, sent: Sequence["SentPart"], runs: Sequence[Run]) -> None:
        """Wait for the parts in turn, and make the step of the other ranks on their shards, in place."""
        self.mismatches = torch.zeros(self.ranks, dtype=torch.int64, device=self.params.device)
        for work, messages, form, start in sent:
            work.wait()
            self.mismatches |= self.kernels.replay_(self.params, messages, runs, form, own=self.rank, start=start)


class SentPart(NamedTuple):
    """The gather of one part's messages, which has started."""

    work: Any
    messages: Tensor
    form: WireFormat
    start: int


class Gathered(NamedTuple):
    """The gather of a bucket's messages, which has started."""

    signs: BucketSigns
    sent: list[SentPart]
    runs: list[Run]

    def replay(self) -> None:
        """Wait for the messages and replay them."""
        self.signs.replay(self.sent, self.runs)


def parts_of(numel: int, smallest: int) -> list[slice]:
    """At most ``MOST_PARTS`` parts of a shard, of about ``smallest`` elements or more, in whole chunks."""
    count = min(max(numel // smallest, 1), MOST_PARTS)
    size = max(-(-numel // (count * CHUNK)) * CHUNK, CHUNK)
    return [slice(start, min(start + size, numel)) for start in range(0, max(numel, 1), size)]


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
