"""The choice among the implementations of :mod:`megatron_lion.exchange`, which have the same bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.exchange.digits import count_exceptions, sign_digits
from megatron_lion.exchange.message import replay_, write_message_
from megatron_lion.kernels.exchange_cpu import (
    count_exceptions_cpu,
    exchange_cpu_problem,
    replay_cpu_,
    sign_digits_cpu,
    write_message_cpu_,
)
from megatron_lion.kernels.implementation import choose_implementation


class ExchangeKernels(NamedTuple):
    """One implementation: its name, and its functions with the signatures of the reference."""

    name: str
    sign_digits: Callable[..., Tensor]
    count_exceptions: Callable[[Tensor], Tensor]
    write_message_: Callable[..., None]
    replay_: Callable[..., Tensor]


REFERENCE = ExchangeKernels("reference", sign_digits, count_exceptions, write_message_, replay_)
CPU = ExchangeKernels("fused", sign_digits_cpu, count_exceptions_cpu, write_message_cpu_, replay_cpu_)


def _gpu() -> ExchangeKernels:
    from megatron_lion.kernels import exchange_gpu as kernels

    # torch's operations count the exceptions without waiting for the device, too.
    functions = kernels.sign_digits_gpu, count_exceptions, kernels.write_message_gpu_, kernels.replay_gpu_
    return ExchangeKernels("fused", *functions)


def choose_exchange(kernel: str, device: torch.device) -> ExchangeKernels:
    """The implementation for parameters on ``device``, as :func:`choose_implementation` says. A kernel that computed
    wrong parameters would be found by the checksum of the first message."""
    return choose_implementation(
        kernel,
        device,
        what="exchange",
        reference=REFERENCE,
        cpu=CPU,
        cpu_problem=exchange_cpu_problem,
        gpu=_gpu,
    )
