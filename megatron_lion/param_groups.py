"""Parameter groups of Lion: their settings, checked where a group is added."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import (
    KERNELS,
    MOMENTUM_INITS,
    LionError,
    check_betas,
    check_choice,
    check_non_negative,
    check_switch,
)


def completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of the group ``given`` with missing settings from ``defaults``, and its parameters in a list.

    Raises LionError for a setting that is out of range, and for parameters that Lion cannot train.
    """
    group = {**given, **defaults, **given}  # megatron-fsdp needs "params" first, as torch has it
    group["betas"] = check_betas(group["betas"])
    for key in ("lr", "weight_decay"):
        group[key] = _checked_rate(key, group[key])
    check_switch("maximize", group["maximize"])
    check_choice("momentum_init", group["momentum_init"], MOMENTUM_INITS)
    check_choice("kernel", group["kernel"], KERNELS)
    params = group["params"]
    refuse_set(params)
    group["params"] = [params] if torch.is_tensor(params) else list(params)
    for param in tensors_of(group):
        if not param.is_floating_point():
            raise LionError(
                f"Lion needs real floating-point parameters, got {param.dtype} of shape {tuple(param.shape)}"
            )
    return group


def refuse_set(params: object) -> None:
    """Raise LionError if ``params`` is a set, which has another order in each process."""
    if isinstance(params, set | frozenset):
        raise LionError("params must have an order, by which a saved state is found again: use a list, not a set")


def tensors_of(group: dict[str, Any]) -> Iterator[Tensor]:
    """The group's parameters, which may also be (name, parameter). Torch refuses what is neither."""
    for entry in group["params"]:
        param = entry[1] if isinstance(entry, tuple) else entry
        if torch.is_tensor(param):
            yield param


def _checked_rate(name: str, value: Any) -> Any:
    """A number as a finite float >= 0. A tensor as it is, because it is read at each step; one on a CPU is checked."""
    if not torch.is_tensor(value):
        return check_non_negative(name, value)
    if value.numel() != 1:
        raise LionError(f"{name} must be a number or a tensor with one element, got one of shape {tuple(value.shape)}")
    if value.device.type == "cpu":
        check_non_negative(name, value.item())
    return value
