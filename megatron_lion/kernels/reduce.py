"""The choice among the implementations of :mod:`megatron_lion.exchange.pieces`, which have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.exchange.pieces import sum_blocks, write_blocks_
from megatron_lion.kernels.reduce_cpu import reduce_cpu_problem, sum_blocks_cpu, write_blocks_cpu_


class ReduceKernels(NamedTuple):
    """One implementation: its name, and its functions with the signatures of the reference."""

    name: str
    write_blocks_: Callable[..., None]
    sum_blocks: Callable[..., Tensor]


REFERENCE = ReduceKernels("reference", write_blocks_, sum_blocks)
CPU = ReduceKernels("fused", write_blocks_cpu_, sum_blocks_cpu)


def choose_reduce(kernel: str, device: torch.device) -> ReduceKernels:
    """The implementation for gradients on ``device``. ``kernel`` is one of :data:`megatron_lion.config.KERNELS`.

    ``"auto"`` and ``"fused"`` are the compiled kernel on a CPU and the Triton kernels on a GPU. Where these are not
    available, ``"auto"`` is the reference. ``"foreach"`` and ``"reference"`` are the reference.

    Raises:
        LionError: ``kernel`` is ``"fused"``, which is not available; the message has the reason.
    """
    if kernel not in ("auto", "fused"):
        return REFERENCE
    if device.type == "cpu":
        problem = reduce_cpu_problem()
    else:
        try:
            from megatron_lion.kernels import reduce_gpu as gpu  # Triton takes a second to import

            return ReduceKernels("fused", gpu.write_blocks_gpu_, gpu.sum_blocks_gpu)
        except ImportError as error:
            problem = str(error)
    if problem is None:
        return CPU
    if kernel == "fused":
        raise LionError(f"the fused kernels of the reduction are not available: {problem}. Use auto or reference")
    return REFERENCE
