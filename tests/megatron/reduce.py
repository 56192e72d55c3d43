"""Run in the place of ``pretrain_gpt.py``: the compressed reduction of gradients, checked in each step.

    torchrun tests/megatron/reduce.py <Megatron's flags>

On every rank and in every reduction, in fp64: what was sent and what was kept is the gradient and what was kept before;
what an owner received is the sum of what was sent; what a flush adds to the momentum is the sum of what was kept.
Prints the largest errors, each in units of its bound, so that 1 is allowed. With REDUCE_NAN=N step N has gradients that
are not finite, on the last rank only. With REDUCE_KIND the model is one of ``kinds.py``, or ``core`` for
``core_loop.py``. With REDUCE_NODE=N every N ranks are taken for a node.
"""

import os
import sys
from collections import Counter
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from megatron_lion.exchange import blocks  # noqa: E402
from megatron_lion.integration import compat  # noqa: E402
from megatron_lion.integration.exchange.block_reduce import BlockReduce  # noqa: E402
from megatron_lion.integration.exchange.bucket_reduction import BucketReduction  # noqa: E402
from tests.megatron.gather import bad_gradients_in  # noqa: E402

NAMES = ("reductions", "nodes", "kept", "received", "flushes", "flushed", "cleared")
FOUND: Counter[str] = Counter()
BF16 = 2.0**-8  # relative error of a rounding to bf16
FP32 = 2.0**-22


def note(name: str, error: torch.Tensor, bound: torch.Tensor) -> None:
    """Keep the largest error in units of ``bound``. NaN in both counts as no error."""
    ratio = torch.where(error == 0, 0.0, error / bound)
    finite = ratio.nan_to_num(nan=0.0) if not bool(bound.isfinite().all()) else ratio
    FOUND[name] = max(FOUND[name], float(finite.max()) if finite.numel() else 0.0)


def kept_values(bucket: BucketReduction, rank: int) -> torch.Tensor:
    residual = bucket.residuals.get(rank)
    return torch.zeros(bucket.numel).double() if residual is None else residual.values(bucket.numel).double()


def sent_values(bucket: BucketReduction, rank: int, message: torch.Tensor) -> torch.Tensor:
    form = bucket.forms[rank]
    parts = form.sections(message)
    values = blocks.dequantize(blocks.unpack(parts.codes, form.code, form.numel), parts.scales, form.numel).double()
    first = 0
    for start, stop in form.exact:
        values[start:stop] = parts.exact[first : first + stop - start]
        first += stop - start
    return values


def check_reductions() -> None:
    pack, receive = BucketReduction.pack, BucketReduction.receive

    def checked_pack(self: Any, exact: Any = None) -> torch.Tensor:
        whole = {rank: self.shard(rank).double() for rank in range(self.ranks)}
        kept = {rank: kept_values(self, rank) for rank in self.others}
        sent = pack(self, exact)
        FOUND["reductions"] += 1
        for rank, message in enumerate(sent.split(self.sent_sizes)):
            if rank == self.rank:
                continue
            wanted, whole[rank] = whole[rank] + kept[rank], sent_values(self, rank, message)
            if self.residuals:
                left = kept_values(self, rank)
                largest = (wanted - whole[rank]).abs()
                padded = torch.nn.functional.pad(largest, (0, -largest.numel() % blocks.BLOCK)).view(-1, blocks.BLOCK)
                of_block = padded.amax(1, keepdim=True).expand_as(padded).reshape(-1)[: self.numel]
                stored = of_block * 2 * BF16 if self.residuals[rank].scales is not None else largest * BF16
                note("kept", (wanted - whole[rank] - left).abs(), stored + FP32 * wanted.abs() + 1e-38)
        self.expected = torch.cat([whole[rank] for rank in range(self.ranks)])
        torch.distributed.all_reduce(self.expected, group=self.group)
        return sent

    def checked_receive(self: Any, messages: torch.Tensor, op: Any) -> None:
        receive(self, messages, op)
        expected = self.expected.view(self.ranks, -1)[self.rank]
        self.share = 1.0 / self.ranks if op == torch.distributed.ReduceOp.AVG else 1.0
        note("received", (self.owned.double() - expected * self.share).abs(), rounding(self, expected))

    BucketReduction.pack, BucketReduction.receive = checked_pack, checked_receive


def rounding(bucket: BucketReduction, expected: torch.Tensor) -> torch.Tensor:
    """What a sum may be off by, in the dtype of the gradient buffer."""
    stored = FP32 if bucket.bucket.grad_data.dtype == torch.float32 else BF16
    return expected.abs() * stored + expected.abs().max() * FP32 + 1e-38


def check_nodes() -> None:
    """On two levels, what is packed is the sum of this node's gradients, or their mean."""
    sum_in_node = BucketReduction._sum_in_node

    def checked_sum(self: Any, op: Any) -> torch.Tensor:
        found = sum_in_node(self, op)
        FOUND["nodes"] += 1
        whole = self.bucket.grad_data.double()
        torch.distributed.all_reduce(whole, group=self.levels.inner)
        expected = whole.view(-1, self.numel)[self.levels.shards].view(-1)
        scale = 1.0 / self.levels.inner.size() if op == torch.distributed.ReduceOp.AVG else 1.0
        note("received", (found.double() - expected * scale).abs(), rounding(self, expected))
        return found

    BucketReduction._sum_in_node = checked_sum


def check_flushes() -> None:
    flush, end_step = BlockReduce.flush, BlockReduce.end_step

    def momenta(self: Any) -> dict[Any, torch.Tensor]:
        lion = self._optimizer.optimizer
        return {
            shard: lion.get_unscaled_state(shard, "exp_avg").double()
            for _, shard, _ in compat.updated_params(self._optimizer)
            if lion.state[shard]
        }

    def checked_flush(self: Any) -> bool:
        if not self.has_residuals:
            return bool(flush(self))
        before, sums = momenta(self), {}
        for bucket in self.buckets:
            whole = torch.zeros(bucket.ranks, bucket.numel, dtype=torch.float64)
            for rank in bucket.others:
                whole[rank] = kept_values(bucket, rank)
            torch.distributed.all_reduce(whole, group=bucket.group)
            sums[id(bucket.bucket)] = whole[bucket.rank] * bucket.share * self._units(bucket)
        flushed = bool(flush(self))
        after = momenta(self)
        FOUND["flushes"] += 1
        for param, shard, group in compat.updated_params(self._optimizer):
            bucket, start, stop = compat.range_in_bucket(self._optimizer, param)
            wanted = before[shard].clone()
            if id(bucket) in sums:
                total = sums[id(bucket)]
                first = start - start % total.numel()
                missing = total[start - first : stop - first].view(shard.shape)
                wanted += (1.0 - group["betas"][1]) * self._clip * missing
            stored = BF16 if self._optimizer.options.momentum_dtype == "bf16" else 0.0
            bound = wanted.abs() * (FP32 + stored) + wanted.abs().max() * FP32 + 1e-38
            note("flushed", (after[shard] - wanted).abs(), bound)
        return flushed

    def checked_end_step(self: Any, *, made: bool) -> None:
        end_step(self, made=made)
        if not made:
            left = [residual.values(b.numel).abs().sum() for b in self.buckets for residual in b.residuals.values()]
            FOUND["cleared"] += int(not any(map(bool, left)))

    BlockReduce.flush, BlockReduce.end_step = checked_flush, checked_end_step


def report() -> None:
    print("reduced:", *(f"{name} {FOUND[name]}" for name in NAMES), flush=True)


def main() -> None:
    if "REDUCE_UNCHECKED" not in os.environ:
        check_reductions()
        check_nodes()
        check_flushes()
    if "REDUCE_NODE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["REDUCE_NODE"]
    if "REDUCE_NAN" in os.environ:
        bad_gradients_in(int(os.environ["REDUCE_NAN"]))
    kind = os.environ.get("REDUCE_KIND", "")
    if kind == "core":
        from tests.megatron import core_loop

        destroy = torch.distributed.destroy_process_group
        torch.distributed.destroy_process_group = lambda: (report(), destroy())
        core_loop.main()
        return
    if kind:
        sys.argv.insert(1, kind)
        from tests.megatron import kinds as script
    else:
        from launch import pretrain_gpt as script
    script.main()
    report()


if __name__ == "__main__":
    main()
