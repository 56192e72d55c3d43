"""Run in the place of ``pretrain_gpt.py`` on one rank: its micro-batches stand for data-parallel ranks.

    python tools/paper/studies/simulated_ranks.py ARM <Megatron's flags>

The gradient of each micro-batch is packed, sent to the owners of its shards and summed there by the code of
``--lion-reduce``, in one process. So a run with k micro-batches in a step learns what a run on k ranks would, and with
the same bits where no clip factor depends on the order of a sum. ARM is one of ``ARMS``.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import ReduceOp  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.exchange.blocks import BLOCK  # noqa: E402
from megatron_lion.integration.exchange.bucket_reduction import BucketReduction  # noqa: E402
from megatron_lion.integration.exchange.levels import flat  # noqa: E402
from megatron_lion.kernels.reduce import choose_reduce  # noqa: E402


class Rank:
    """A place in a group of ranks that does not exist."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


class Gradients:
    """A bucket of one simulated rank: what BucketReduction needs of Megatron's."""

    def __init__(self, grad_data: Tensor) -> None:
        self.grad_data = grad_data


class PackedBlocks:
    """Reduces a bucket as --lion-reduce does, with the residuals of every simulated rank."""

    def __init__(self, code: str, feedback: str) -> None:
        self.code, self.feedback = code, feedback
        self._reductions: dict[int, list[BucketReduction]] = {}

    def __call__(self, bucket: Any, gradients: list[Tensor]) -> Tensor:
        reductions = self._reductions.get(id(bucket)) or self._made_for(bucket, gradients)
        sent = []
        for reduction, gradient in zip(reductions, gradients, strict=True):
            reduction.bucket.grad_data = gradient.clone()
            sent.append(reduction.pack().split(reduction.sent_sizes))
        for owner, reduction in enumerate(reductions):
            messages = [messages[owner] for rank, messages in enumerate(sent) if rank != owner]
            reduction.receive(torch.stack(messages), ReduceOp.SUM)
        return torch.cat([reduction.shard(reduction.rank) for reduction in reductions])

    def _made_for(self, bucket: Any, gradients: list[Tensor]) -> list[BucketReduction]:
        starts = {param: start for param, (start, _) in bucket.param_to_index.items()}
        kernels = choose_reduce("auto", bucket.grad_data.device)
        self._reductions[id(bucket)] = [
            BucketReduction(
                Gradients(gradient),
                starts,
                flat(Rank(rank, len(gradients))),
                kernels,
                code=self.code,
                feedback=self.feedback,
            )
            for rank, gradient in enumerate(gradients)
        ]
        return self._reductions[id(bucket)]


class OneBit:
    """sign(v) mean |v| in blocks of 64, with fp32 error feedback. A reference of the study, not of this package."""

    def __init__(self) -> None:
        self._residuals: dict[int, list[Tensor]] = {}

    def __call__(self, bucket: Any, gradients: list[Tensor]) -> Tensor:
        residuals = self._residuals.setdefault(id(bucket), [torch.zeros_like(g) for g in gradients])
        total = torch.zeros_like(gradients[0])
        for rank, gradient in enumerate(gradients):
            blocks = (gradient + residuals[rank]).view(-1, BLOCK)
            sent = torch.sign(blocks) * blocks.abs().mean(1, keepdim=True).bfloat16().float()
            residuals[rank] = (blocks - sent).view(-1)
            total += sent.view(-1)
        return total


class Vote:
    """Distributed Lion: the majority of sign(c) of each rank's own momentum. Another algorithm, for reference.

    The votes replace the gradient, for a Lion with beta1 = 0, and without clipping.
    """

    BETA1, BETA2 = 0.9, 0.95

    def __init__(self) -> None:
        self._momenta: dict[int, list[Tensor]] = {}

    def __call__(self, bucket: Any, gradients: list[Tensor]) -> Tensor:
        momenta = self._momenta.setdefault(id(bucket), [torch.zeros_like(g) for g in gradients])
        votes = torch.zeros_like(gradients[0])
        for rank, gradient in enumerate(gradients):
            votes += torch.sign(self.BETA1 * momenta[rank] + (1 - self.BETA1) * gradient)
            momenta[rank] = self.BETA2 * momenta[rank] + (1 - self.BETA2) * gradient
        return votes


def exact(bucket: Any, gradients: list[Tensor]) -> Tensor:
    """The fp32 sum."""
    return torch.stack(gradients).sum(0)


def in_bf16(bucket: Any, gradients: list[Tensor]) -> Tensor:
    """The fp32 sum of gradients in bf16, as with Megatron's --grad-reduce-in-bf16 and fp32 accumulation."""
    return torch.stack([gradient.bfloat16().float() for gradient in gradients]).sum(0)


Reduce = Callable[[Any, list[Tensor]], Tensor]
ARMS: dict[str, Callable[[], Reduce]] = {
    "fp32": lambda: exact,
    "bf16": lambda: in_bf16,
    **{
        f"{code}{'' if feedback == 'int8' else '-' + feedback}": lambda code=code, feedback=feedback: PackedBlocks(
            code, feedback
        )
        for code in ("int8", "int4", "ternary")
        for feedback in ("int8", "bf16", "none")
    },
    "1bit": OneBit,
    "vote": Vote,
}
FLAGS = {"vote": "--lion-beta1 0 --clip-grad 0"}  # of Megatron, after the run's own


def simulate(reduce: Reduce) -> None:
    """Keep the gradient of each micro-batch by itself, and let ``reduce`` sum them where Megatron would send them."""
    kept: dict[int, list[Tensor]] = {}
    buckets: dict[int, Any] = {}
    stack: list[None] = []
    init, backward = _ParamAndGradBucketGroup.__init__, schedules.backward_step
    start = _ParamAndGradBucketGroup.start_grad_sync

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        buckets.update((id(bucket), bucket) for bucket in self.buckets)

    def keep_apart(*arguments: Any, **options: Any) -> Any:
        stack.append(None)
        result = backward(*arguments, **options)
        stack.pop()
        if not stack:  # once for each micro-batch
            for key, bucket in buckets.items():
                kept.setdefault(key, []).append(bucket.grad_data.clone())
                bucket.grad_data.zero_()
        return result

    def reduced(self: Any, *arguments: Any, **options: Any) -> None:
        for bucket in self.buckets:
            bucket.grad_data.copy_(reduce(bucket, kept.pop(id(bucket))))
        start(self, *arguments, **options)

    _ParamAndGradBucketGroup.__init__ = noted
    schedules.backward_step = keep_apart
    _ParamAndGradBucketGroup.start_grad_sync = reduced


def main() -> None:
    """Train one arm. What follows its name is for Megatron."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=ARMS, help="how gradients are reduced")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="Megatron's flags")
    options = parser.parse_args()
    sys.argv[1:] = [*options.flags, *FLAGS.get(options.arm, "").split()]
    simulate(ARMS[options.arm]())
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
