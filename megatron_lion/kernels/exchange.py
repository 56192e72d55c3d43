"""The choice among the implementations of :mod:`megatron_lion.exchange`, which have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.exchange.digits import sign_digits
from megatron_lion.exchange.message import replay_, write_message_
from megatron_lion.kernels.exchange_cpu import exchange_cpu_problem, replay_cpu_, sign_digits_cpu, write_message_cpu_


class ExchangeKernels(NamedTuple):
    """One implementation: its name, and its functions with the signatures of the reference."""

    name: str
    sign_digits: Callable[..., Tensor]
    write_message_: Callable[..., None]
    replay_: Callable[..., Tensor]


REFERENCE = ExchangeKernels("reference", sign_digits, write_message_, replay_)
CPU = ExchangeKernels("fused", sign_digits_cpu, write_message_cpu_, replay_cpu_)


def choose_exchange(kernel: str, device: torch.device) -> ExchangeKernels:
    """The implementation for parameters on ``device``. ``kernel`` is one of :data:`megatron_lion.config.KERNELS`.

    ``"auto"`` and ``"fused"`` are the compiled kernel on a CPU and the Triton kernels on a GPU. Where these are not
    available, ``"auto"`` is the reference. ``"foreach"`` and ``"reference"`` are the reference. A kernel that computed
    wrong parameters would be found by the checksum of the first message.

    Raises:
        LionError: ``kernel`` is ``"fused"``, which is not available; the message has the reason.
    """
    if kernel not in ("auto", "fused"):
        return REFERENCE
    if device.type == "cpu":
        problem = exchange_cpu_problem()
    else:
        try:
            from megatron_lion.kernels import exchange_gpu as gpu  # Triton takes a second to import

            return ExchangeKernels("fused", gpu.sign_digits_gpu, gpu.write_message_gpu_, gpu.replay_gpu_)
        except ImportError as error:
            problem = str(error)
    if problem is None:
        return CPU
    if kernel == "fused":
        raise LionError(f"the fused kernels of the exchange are not available: {problem}. Use auto or reference")
    return REFERENCE
