"""Run in the place of ``pretrain_gpt.py``: the sign gather, checked before each step and at the end.

    torchrun tests/megatron/gather.py FAULT [KIND] <Megatron's flags>

Compares every rank's parameters with their owners', bit by bit, and says on each rank how they were sent. FAULT is
``none``, or one of ``FAULTS``, which puts a mistake into the exchange. KIND is one of ``kinds.py``, or ``core``, which
is ``core_loop.py``. With GATHER_RELOAD=N the checkpoint in --save is loaded again after step N. With GATHER_NAN=N step
N has gradients that are not finite, on the last rank only. With GATHER_PARTS=N shards are sent in N parts.
"""

import itertools
import os
import sys
from collections import Counter
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from megatron_lion.exchange.message import Run  # noqa: E402
from megatron_lion.integration import loop_callbacks  # noqa: E402
from megatron_lion.integration.exchange import bucket_signs  # noqa: E402
from megatron_lion.integration.exchange.bucket_groups import SignBucketGroup, State  # noqa: E402
from megatron_lion.integration.exchange.bucket_signs import BucketSigns  # noqa: E402
from megatron_lion.integration.exchange.sign_gather import SignGather  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402
from megatron_lion.integration.optimizer.distributed import LionDistributedOptimizer  # noqa: E402

NAMES = (
    *("steps", "groups", "buckets", "full", "signs", "parts", "replays"),
    *("exceptions", "mismatches", "differing", "gathered"),
)
COUNTS: Counter[str] = Counter()
GATHERS: list[SignGather] = []


def settle_and_compare(gather: SignGather) -> None:
    """Count the bytes of this rank's parameters that differ from their owners'."""
    for group in gather.groups:
        group.settle()
    for signs in gather.buckets:
        owned = torch.empty_like(signs.params)
        COUNTS["gathered"] -= signs.shard.nbytes  # ours
        torch.distributed.all_gather_into_tensor(owned, signs.shard.clone(), group=signs.group)
        COUNTS["differing"] += int((owned.view(torch.uint8) != signs.params.view(torch.uint8)).sum())
        COUNTS["mismatches"] += int(signs.differs())


def record_bytes() -> None:
    """Count the bytes that this rank puts into all-gathers of tensors, whoever calls them."""
    group = torch.distributed.ProcessGroup

    def recorded(stock):
        def gather(self, output, sent, *options, **more):
            COUNTS["gathered"] += sum(tensor.nbytes for tensor in (sent if isinstance(sent, list) else [sent]))
            return stock(self, output, sent, *options, **more)

        return gather

    for name in ("", "_coalesced"):  # torch has renamed them
        for stem in ("_allgather_base", "allgather_into_tensor", "all_gather_single"):
            if stock := getattr(group, stem + name, None):
                setattr(group, stem + name, recorded(stock))


def count_and_compare() -> None:
    """Have each sign gather count what it does, and compare before each step but the first."""
    begin_step, end_step, gather, replay = (
        SignGather.begin_step,
        SignGather.end_step,
        BucketSigns.gather,
        BucketSigns.replay,
    )

    def checked_begin_step(self):
        if self in GATHERS:
            settle_and_compare(self)
        else:
            GATHERS.append(self)
        begin_step(self)

    def counted_end_step(self):
        end_step(self)
        COUNTS["steps"] += 1

    def counted_gather(self, **options):
        COUNTS["signs"] += 1
        gathered = gather(self, **options)
        COUNTS["parts"] += len(gathered.sent)
        return gathered

    def counted_replay(self, *arguments):
        COUNTS["replays"] += 1
        replay(self, *arguments)

    SignGather.begin_step, SignGather.end_step = checked_begin_step, counted_end_step
    BucketSigns.gather, BucketSigns.replay = counted_gather, counted_replay


def report() -> None:
    for gather in GATHERS:
        COUNTS["exceptions"] += gather.sent.exceptions
        for group in gather.groups:
            group.start_param_sync(force_sync=True)
            COUNTS["full"] += group.full_gathers
            COUNTS["groups"] += 1
            COUNTS["buckets"] += len(group.signs)
        settle_and_compare(gather)
    print("exchanged:", *(f"{name} {COUNTS[name]}" for name in NAMES), flush=True)


def reload_after(number: int) -> None:
    """Load the checkpoint of this run after its step ``number``."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint

    models: list[Any] = []
    loop_callbacks.before_step.append(lambda step, _: models.append(step.model))

    def load(optimizer: Any, iteration: int) -> None:
        if iteration == number:
            args = get_args()
            args.load = args.save
            load_checkpoint(models[-1], optimizer, None)

    loop_callbacks.after_step.append(load)


def bad_gradients_in(number: int) -> None:
    """Make the gradients of the last rank NaN before step ``number``."""
    step, made = LionChainedOptimizer.step, Counter()

    def with_bad_gradients(self):
        made[self] += 1
        if made[self] == number and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            for sub_optimizer in self.chained_optimizers:
                for buffer in sub_optimizer.buffers:
                    buffer.grad_data.fill_(float("nan"))
        return step(self)

    LionChainedOptimizer.step = with_bad_gradients


def send_in_parts(number: int) -> None:
    """Send every shard in ``number`` parts, which need not be whole groups of trits."""

    def parts(numel: int, smallest: int) -> list[slice]:
        cuts = [numel * i // number for i in range(number + 1)]
        return [slice(*ends) for ends in itertools.pairwise(cuts)]

    bucket_signs.parts_of = parts


def replay_twice_after_a_skip() -> None:
    start = SignBucketGroup.start_param_sync
    prepare = BucketSigns.prepare

    def kept(self, *arguments):
        prepare(self, *arguments)
        self.last = self._digits, self._pending

    def start_again(self, force_sync=False):
        # As Megatron's, which gathers whenever a forward pass asks for parameters.
        if self.state is State.CLEAN and not force_sync and all(hasattr(signs, "last") for signs in self.signs):
            for signs in self.signs:
                signs._digits, signs._pending = signs.last
            self.state = State.SIGNS
        start(self, force_sync)

    BucketSigns.prepare, SignBucketGroup.start_param_sync = kept, start_again


def next_steps_lr() -> None:
    end_step, replay = SignGather.end_step, BucketSigns.replay

    def noted(self):
        end_step(self)
        for signs in self.buckets:
            signs.lion = self._optimizer.optimizer

    def with_the_rates_of_now(self, sent, runs):
        groups = self.lion.param_groups
        rates = [(float(group["lr"]), float(group["weight_decay"])) for group in groups]
        replay(self, sent, [Run(span.start, span.stop, *rates[span.group]) for span in self.spans])

    SignGather.end_step, BucketSigns.replay = noted, with_the_rates_of_now


def own_shard_replayed() -> None:
    replay = BucketSigns.replay

    def with_its_own(self, sent, runs):
        rank, self.rank = self.rank, None
        replay(self, sent, runs)
        self.rank = rank
        self.mismatches[rank] = 0  # which nobody would look at

    BucketSigns.replay = with_its_own


def another_groups_weight_decay() -> None:
    init = BucketSigns.__init__

    def mistaken(self, bucket, spans, *arguments, **options):
        init(self, bucket, [span._replace(group=0) for span in spans], *arguments, **options)

    BucketSigns.__init__ = mistaken


def stale_signs_after_a_load() -> None:
    LionDistributedOptimizer._require_full_gather = lambda self: None


def overflow_ignored_on_one_rank() -> None:
    count = BucketSigns.count_exceptions

    def count_unless_it_is_the_most(self):
        mine = count(self)
        most = mine.clone()
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return torch.where(mine < most, mine, 0)

    BucketSigns.count_exceptions = count_unless_it_is_the_most


def flipped_bit() -> None:
    """One bit of one parameter of rank 0, on the last rank, before its third step."""
    begin_step = SignGather.begin_step

    def flip(self):
        begin_step(self)
        signs = self.buckets[-1]
        if self._steps == 3 and signs.rank == signs.ranks - 1:
            signs.params.view(torch.uint8)[0] ^= 1

    SignGather.begin_step = flip


FAULTS = {
    fault.__name__: fault
    for fault in (
        replay_twice_after_a_skip,
        next_steps_lr,
        own_shard_replayed,
        another_groups_weight_decay,
        stale_signs_after_a_load,
        overflow_ignored_on_one_rank,
        flipped_bit,
    )
}


def main() -> None:
    fault = sys.argv.pop(1)
    if fault != "none":
        FAULTS[fault]()
    count_and_compare()
    record_bytes()
    if "GATHER_RELOAD" in os.environ:
        reload_after(int(os.environ["GATHER_RELOAD"]))
    if "GATHER_NAN" in os.environ:
        bad_gradients_in(int(os.environ["GATHER_NAN"]))
    if "GATHER_PARTS" in os.environ:
        send_in_parts(int(os.environ["GATHER_PARTS"]))
    if sys.argv[1] == "core":
        from tests.megatron import core_loop

        destroy = torch.distributed.destroy_process_group
        torch.distributed.destroy_process_group = lambda: (report(), destroy())
        del sys.argv[1]
        core_loop.main()
        return
    if sys.argv[1].startswith("--"):
        from launch import pretrain_gpt as script
    else:
        from tests.megatron import kinds as script
    script.main()
    report()


if __name__ == "__main__":
    main()
