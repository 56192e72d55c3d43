"""One parameter's tensors in a step of Lion, and rows of them as the columns that a kernel takes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lion.precision import Place


class Row(NamedTuple):
    """What a step reads and writes for one parameter."""

    param: Tensor
    master: Tensor
    """what the step updates: fp32 master weights, or the parameter itself"""
    grad: Tensor
    exp_avg: Tensor
    copy: Tensor | None
    """what receives the new master, rounded"""
    remainder: Tensor | None
    scale: Tensor | None
    place: Place | None
    """where there is a scale"""

    def kind(self) -> tuple[Any, ...]:
        """Equal for rows that one call of a kernel can update."""
        master = self.master
        stored = (master.dtype, self.grad.dtype, self.exp_avg.dtype, master.device)
        return (*stored, self.copy is None, self.remainder is None, self.scale is None)


def row_of(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], copy: Tensor | None, place: Place | None) -> Row:
    """The row of ``param`` with its ``state`` (:mod:`megatron_lion.storage`); ``copy`` is one kept outside of it."""
    master = state.get("master_param")
    has_remainder = master is not None and master.dtype == torch.int16
    has_copy = master is not None and not has_remainder
    return Row(
        param=param,
        master=master if master is not None and has_copy else param,
        grad=grad,
        exp_avg=state["exp_avg"],
        copy=param if has_copy else copy,
        remainder=master if has_remainder else None,
        scale=state.get("exp_avg_scale"),
        place=place,
    )


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """The tensors of ``rows``, which are of one kind, by the names of a kernel's arguments."""
    scales = _all_or_none([row.scale for row in rows])
    return {
        "params": [row.master for row in rows],
        "grads": [row.grad for row in rows],
        "exp_avgs": [row.exp_avg for row in rows],
        "copies": _all_or_none([row.copy for row in rows]),
        "remainders": _all_or_none([row.remainder for row in rows]),
        "scales": scales,
        "places": None if scales is None else [row.place for row in rows],
    }


def _all_or_none(tensors: list[Tensor | None]) -> list[Tensor] | None:
    """Rows of one kind have all of a role's tensors or none."""
    there = [tensor for tensor in tensors if tensor is not None]
    return there or None
