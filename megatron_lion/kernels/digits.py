"""The digits of a step (:mod:`megatron_lion.exchange.digits`) for kernels that make several passes over memory.

The one-pass kernels, in C++ and Triton, write them themselves.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lion.kernels.exchange import choose_exchange
from megatron_lion.step import LionUpdate, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import inputs, lion_sign

# Elements with old parameters and signs that are kept at a time: 3 to 5 bytes each.
MAX_NUMEL = 1 << 24


def with_digits(update: LionUpdate, kernel: str, device: torch.device) -> LionUpdate:
    """``update``, preceded by a pass that computes the signs and followed by one that writes ``tensors.digits``.

    ``kernel`` is one of :data:`megatron_lion.config.KERNELS`, and chooses how the second pass is computed.
    """
    sign_digits = choose_exchange(kernel, device).sign_digits

    @torch.no_grad()
    def update_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
        if tensors.digits is None:
            update(tensors, scalars, telemetry)
            return
        refuse_skip(scalars)
        lr, beta1, _, weight_decay, grad_scale = scalars.on_host()
        rates = {"lr": lr, "weight_decay": weight_decay, "half_away": tensors.remainders is not None}
        for some in _pieces(tensors):
            signs = [_sign(entry, beta1, grad_scale) for entry in some.entries()]
            before = [param.clone() for param in some.model_params]
            update(dataclasses.replace(some, digits=None), scalars, telemetry)
            for digits, old, new, sign in zip(some.digits or (), before, some.model_params, signs, strict=True):
                digits.copy_(sign_digits(old, new, sign, **rates).view(digits.shape))

    return update_


def refuse_skip(scalars: StepScalars) -> None:
    """Raise ValueError if a step with digits could be skipped: other ranks could not know that nothing was changed."""
    if scalars.skip is not None:
        raise ValueError("a step with digits cannot be skipped on the device: use skip=None")


def _sign(entry: tuple[Any, ...], beta1: float, grad_scale: float) -> Tensor:
    master, grad, exp_avg, _, _, scale, layout = entry
    grad, momentum = inputs(master, grad, exp_avg, scale, layout, grad_scale)
    return lion_sign(grad, momentum, beta1).to(torch.int8)


def _pieces(tensors: StepTensors) -> Iterator[StepTensors]:
    """``tensors`` in pieces of at most ``MAX_NUMEL`` elements, or of one parameter."""
    ends = list(itertools.accumulate(tensors.numels))
    numbers = [end // MAX_NUMEL for end in ends]
    for number in dict.fromkeys(numbers):
        yield tensors.select([here == number for here in numbers])
