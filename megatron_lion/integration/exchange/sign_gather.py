"""The sign gather of one distributed optimizer: what it does before and after each step, and its checks."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from megatron_lion.config import LionOptions
from megatron_lion.exchange.message import WireFormat
from megatron_lion.integration import compat, console
from megatron_lion.integration.exchange.bucket_groups import SignBucketGroup, State, convert
from megatron_lion.integration.exchange.bucket_signs import BucketSigns, Span
from megatron_lion.integration.exchange.groups import bucket_groups_of, param_starts
from megatron_lion.kernels.exchange import choose_exchange


@dataclass
class Sent:
    """What this rank has sent since the start, its own share of each gather."""

    nbytes: int = 0
    """of messages and of parameters"""
    elements: int = 0
    """parameters that were brought up to date"""
    exceptions: int = 0
    full_gathers: int = 0
    """of bucket groups"""

    def __sub__(self, earlier: "Sent") -> "Sent":
        return Sent(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(earlier), strict=True)))


class SignGather:
    """Prepares the messages of each step. The bucket groups send them when Megatron synchronizes the parameters.

    Args:
        optimizer: a :class:`LionDistributedOptimizer`.
        groups: its bucket groups, converted.
        refresh: a full gather after every this many steps; 0 for none.
    """

    def __init__(self, optimizer: Any, groups: Sequence[SignBucketGroup], refresh: int) -> None:
        self._optimizer = optimizer
        self.groups = list(groups)
        self._refresh = refresh
        self._steps = 0
        self._rates: list[tuple[float, float]] = []
        self.sent = Sent()
        self._taken = Sent()

    @property
    def buckets(self) -> list[BucketSigns]:
        """The buckets of all groups."""
        return [signs for group in self.groups for signs in group.signs]

    def take_sent(self) -> Sent:
        """What was sent since the last call."""
        since, self._taken = self.sent - self._taken, replace(self.sent)
        return since

    def require_full(self) -> None:
        """Send the parameters in full up to and after the next step, because they were loaded or replaced."""
        for group in self.groups:
            group.require_full()

    def begin_step(self) -> None:
        """Finish the last step's exchange, and have Lion write the digits of this step."""
        for group in self.groups:
            group.settle()
        lion = self._optimizer.optimizer
        # Before the schedule moves them, which it does before an overlapped replay.
        self._rates = [(float(group["lr"]), float(group["weight_decay"])) for group in lion.param_groups]
        self._steps += 1
        if self._refresh and self._steps % self._refresh == 0:
            self.require_full()
        sending = [signs for group in self.groups if group.state is State.CLEAN for signs in group.signs]
        of_bucket = {id(signs.bucket): signs for signs in sending}
        for signs in sending:
            signs.begin_step()
        lion.digits = {}
        for param, shard, _ in compat.updated_params(self._optimizer):
            bucket, start, stop = compat.range_in_bucket(self._optimizer, param)
            if id(bucket) in of_bucket:
                lion.digits[shard] = of_bucket[id(bucket)].digits(start, stop).view(shard.shape)

    def end_step(self) -> None:
        """Choose how each group sends the step. The model's parameters are written already.

        Issues one all-reduce over the data-parallel ranks, of a number for each bucket and one for each of its parts.
        """
        self._optimizer.optimizer.digits = {}
        buckets = self.buckets
        counts = torch.cat([signs.count_exceptions() for signs in buckets])
        largest = torch.cat([counts, torch.stack([signs.differs() for signs in buckets])])
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=buckets[0].group)
        self.sent.exceptions += int(counts.sum())
        numbers = iter(largest.tolist())
        exceptions = {signs: [next(numbers) for _ in signs.parts] for signs in buckets}
        differs = dict(zip(buckets, numbers, strict=True))
        if any(differs.values()):
            self._name_mismatches()
        for group in self.groups:
            if any(differs[signs] for signs in group.signs):
                group.require_full()
            self._decide(group, [signs.forms(exceptions[signs]) for signs in group.signs])

    def _decide(self, group: SignBucketGroup, forms: Sequence[Sequence[WireFormat]]) -> None:
        """Have ``group`` send signs in ``forms``, unless it has to send its parameters or signs are not smaller."""
        in_full = sum(signs.shard.nbytes for signs in group.signs)
        message_bytes = sum(form.nbytes for of_bucket in forms for form in of_bucket)
        if group.state in (State.STALE, State.FULL) or message_bytes >= in_full:
            group.require_full(State.FULL)
        else:
            for signs, of_bucket in zip(group.signs, forms, strict=True):
                signs.prepare(self._rates, of_bucket)
            group.state = State.SIGNS
        is_full = group.state is State.FULL
        self.sent.nbytes += in_full if is_full else message_bytes
        self.sent.elements += sum(signs.numel for signs in group.signs)
        self.sent.full_gathers += is_full

    def _name_mismatches(self) -> None:
        """Say on this rank which shards of which buckets differ from their owner's."""
        buckets = self.buckets
        for number, signs in enumerate(buckets):
            if signs.mismatches is None:
                continue
            owners = [
                torch.distributed.get_global_rank(signs.group, rank)
                for rank, mismatch in enumerate(signs.mismatches.tolist())
                if mismatch
            ]
            if owners:
                console.warn_here(
                    f"--lion-gather signs: on rank {torch.distributed.get_rank()} the parameters of rank "
                    f"{', '.join(map(str, owners))} in bucket {number} of {len(buckets)} ({signs.numel} elements per "
                    "rank) differ from their owner's. They are gathered in full after this step"
                )


def install(options: LionOptions, optimizer: Any) -> None:
    """Let every distributed optimizer in the chain ``optimizer`` gather signs, where it has more than one rank."""
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if sub_optimizer.is_stub_optimizer or sub_optimizer.data_parallel_group.size() == 1:
            continue
        groups = [_converted(options, sub_optimizer, group) for group in bucket_groups_of(sub_optimizer)]
        sub_optimizer.sign_gather = SignGather(sub_optimizer, groups, options.gather_refresh)


def gathers_of(optimizer: Any) -> list[SignGather]:
    """The sign gathers of the optimizers in the chain ``optimizer``."""
    found = (getattr(sub_optimizer, "sign_gather", None) for sub_optimizer in compat.sub_optimizers_of(optimizer))
    return [gather for gather in found if gather is not None]


def describe(optimizer: Any) -> str:
    """What is gathered, for the start-up line: the smallest messages, without exceptions, and the parameters."""
    buckets = [signs for gather in gathers_of(optimizer) for signs in gather.buckets]
    if not buckets:
        return "no gather (DP=1)"

    def smallest(signs: BucketSigns) -> int:
        return sum(form.nbytes for form in signs.forms([0] * len(signs.parts)))

    bits = [
        8 * sum(sizes) / sum(signs.numel for signs in buckets)
        for sizes in zip(*((smallest(signs), signs.shard.nbytes) for signs in buckets), strict=True)
    ]
    kernel = buckets[0].kernels.name
    return f"{kernel} gather of signs ({bits[0]:.2f} bits per parameter instead of {bits[1]:.3g}, plus exceptions)"


def _converted(options: LionOptions, sub_optimizer: Any, group: Any) -> SignBucketGroup:
    signs = [
        BucketSigns(
            bucket,
            [
                Span(start, start + param.numel(), sub_optimizer.group_of[param])
                for param, start in param_starts(sub_optimizer, bucket).items()
            ],
            group.intra_distributed_optimizer_instance_group,
            choose_exchange(options.kernel, bucket.param_data.device),
            half_away=options.master_weights == "remainder",
        )
        for bucket in group.buckets
    ]
    return convert(group, signs)
