"""The choice among the implementations of :mod:`megatron_lion.exchange.pieces`, which have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.pieces import sum_blocks, write_blocks_


class ReduceKernels(NamedTuple):
    """One implementation: its name, and its functions with the signatures of the reference."""

    name: str
    write_blocks_: Callable[..., None]
    sum_blocks: Callable[..., Tensor]


REFERENCE = ReduceKernels("reference", write_blocks_, sum_blocks)


def choose_reduce(kernel: str, device: torch.device) -> ReduceKernels:
    """The implementation for gradients on ``device``. ``kernel`` is one of :data:`megatron_lion.config.KERNELS`."""
    return REFERENCE
