"""The choice among the implementations of :mod:`megatron_lion.exchange.pieces`, which have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.pieces import sum_blocks, write_blocks_
from megatron_lion.kernels.implementation import choose_implementation
from megatron_lion.kernels.reduce_cpu import reduce_cpu_problem, sum_blocks_cpu, write_blocks_cpu_


class ReduceKernels(NamedTuple):
    """One implementation: its name, and its functions with the signatures of the reference."""

    name: str
    write_blocks_: Callable[..., None]
    sum_blocks: Callable[..., Tensor]


REFERENCE = ReduceKernels("reference", write_blocks_, sum_blocks)
CPU = ReduceKernels("fused", write_blocks_cpu_, sum_blocks_cpu)


def _gpu() -> ReduceKernels:
    from megatron_lion.kernels import reduce_gpu as kernels

    return ReduceKernels("fused", kernels.write_blocks_gpu_, kernels.sum_blocks_gpu)


def choose_reduce(kernel: str, device: torch.device) -> ReduceKernels:
    """The implementation for gradients on ``device``, as :func:`choose_implementation` says."""
    return choose_implementation(
        kernel,
        device,
        what="reduction",
        reference=REFERENCE,
        cpu=CPU,
        cpu_problem=reduce_cpu_problem,
        gpu=_gpu,
    )
