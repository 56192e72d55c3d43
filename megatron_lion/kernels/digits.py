"""The reference step with digits (:mod:`megatron_lion.exchange.digits`). The other kernels write them themselves."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lion.exchange.digits import sign_digits
from megatron_lion.step import StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import inputs, lion_sign, lion_update_

# Elements with old parameters and signs that are kept at a time: 3 to 5 bytes each.
MAX_NUMEL = 1 << 24


@torch.no_grad()
def lion_update_with_digits_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_`, after a pass for the signs and before one that writes the digits.

    Raises ValueError if there are digits and the step may be skipped on the device.
    """
    if tensors.digits is None:
        lion_update_(tensors, scalars, telemetry)
        return
    refuse_skip(tensors, scalars)
    lr, beta1, _, weight_decay, grad_scale = scalars.on_host()
    half_away = tensors.remainders is not None
    for some in _pieces(tensors):
        signs = [_sign(entry, beta1, grad_scale) for entry in some.entries()]
        before = [param.clone() for param in some.model_params]
        lion_update_(dataclasses.replace(some, digits=None), scalars, telemetry)
        for digits, old, new, sign in zip(some.digits or (), before, some.model_params, signs, strict=True):
            made = sign_digits(old, new, sign, lr=lr, weight_decay=weight_decay, half_away=half_away)
            digits.copy_(made.view(digits.shape))


def refuse_skip(tensors: StepTensors, scalars: StepScalars) -> None:
    """Raise ValueError if a step with digits could be skipped: other ranks could not know that nothing was changed."""
    if tensors.digits is not None and scalars.skip is not None:
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
