"""The arms of tools/paper/reduce_study.py: functions that sum the gradients of ranks simulated in one process.

A :data:`Reduce` is called with a bucket, as ``BucketReduction`` needs it, and with the flat gradient of each rank. It
returns the sum. The packed arms are the code of ``--lion-reduce`` on every simulated rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_lion.exchange.blocks import BLOCK
from megatron_lion.integration.exchange.bucket_reduction import BucketReduction
from megatron_lion.integration.exchange.levels import flat
from megatron_lion.kernels.reduce import choose_reduce

CLIP = 1.0  # the largest norm of a gradient


def clipped(gradient: Tensor) -> Tensor:
    """``gradient``, scaled to the norm ``CLIP`` where it is larger."""
    return gradient * min(1.0, CLIP / (float(gradient.norm()) + 1e-6))


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
        reductions = self.reductions(bucket, len(gradients))
        sent = []
        for reduction, gradient in zip(reductions, gradients, strict=True):
            reduction.bucket.grad_data = gradient.clone()
            sent.append(reduction.pack().split(reduction.sent_sizes))
        for owner, reduction in enumerate(reductions):
            messages = [messages[owner] for rank, messages in enumerate(sent) if rank != owner]
            reduction.receive(torch.stack(messages), ReduceOp.SUM)
        return torch.cat([reduction.shard(reduction.rank) for reduction in reductions])

    def reductions(self, bucket: Any, ranks: int) -> list[BucketReduction]:
        """That of each rank for ``bucket``."""
        if id(bucket) not in self._reductions:
            starts = {param: start for param, (start, _) in bucket.param_to_index.items()}
            kernels = choose_reduce("auto", bucket.grad_data.device)
            self._reductions[id(bucket)] = [
                BucketReduction(
                    Gradients(bucket.grad_data),
                    starts,
                    flat(Rank(rank, ranks)),
                    kernels,
                    code=self.code,
                    feedback=self.feedback,
                )
                for rank in range(ranks)
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

    Each rank clips its own gradient. The votes replace the sum, for a Lion with beta1 = 0 that does not clip them.
    """

    BETA1, BETA2 = 0.9, 0.95

    def __init__(self) -> None:
        self._momenta: dict[int, list[Tensor]] = {}

    def __call__(self, bucket: Any, gradients: list[Tensor]) -> Tensor:
        momenta = self._momenta.setdefault(id(bucket), [torch.zeros_like(g) for g in gradients])
        votes = torch.zeros_like(gradients[0])
        for rank, gradient in enumerate(gradients):
            own = clipped(len(gradients) * gradient)  # which was divided by the number of ranks
            votes += torch.sign(self.BETA1 * momenta[rank] + (1 - self.BETA1) * own)
            momenta[rank] = self.BETA2 * momenta[rank] + (1 - self.BETA2) * own
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
