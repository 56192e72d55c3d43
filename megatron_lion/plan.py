"""The kernel calls of a parameter group's step, reused until one of its tensors or settings changes.

Making the calls checks every tensor. For thousands of tensors that takes much longer than comparing them with those of
the last step, and a GPU would wait for it.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lion.step import LionUpdate, StepTensors
from megatron_lion.storage import State

_dtype = operator.attrgetter("dtype")
# Digits for each of some parameters, None where the step leaves none; None for all without.
DigitsOf = Callable[[Sequence[Tensor]], Sequence[Tensor | None] | None]
STATE_KEYS = ("exp_avg", "exp_avg_scale", "master_param")


@dataclass
class KernelCall:
    """One call of a kernel, and the parameters that it updates.

    It has their gradients and digits only from :meth:`take` to :meth:`run`, so that memory that the user frees between
    steps is free. Gradients are usually new tensors in each step, at the same addresses; digits may be anywhere.
    """

    update: LionUpdate
    tensors: StepTensors
    params: Sequence[Tensor]
    states: Sequence[State]
    chosen: list[bool]
    """For each parameter of the group, whether it is in this call."""

    def __post_init__(self) -> None:
        self._stored = {key: [state[key] for state in self.states] for key in STATE_KEYS if key in self.states[0]}
        self._form = _form(self.tensors.grads)
        self._has_digits = self.tensors.digits is not None
        self._indices = list(range(len(self.tensors.addresses)))

    def take(self, grads: Sequence[Tensor | None], digits_of: DigitsOf) -> bool:
        """Use the group's new ``grads`` and digits if nothing else about the tensors has changed. Return whether.

        Compared are identities of the state's tensors, addresses of all tensors, and dtype and contiguity of the
        gradients. Sizes are not: a gradient always has those of its parameter.
        """
        for key, tensors in self._stored.items():
            if not _same(map(dict.get, self.states, itertools.repeat(key)), tensors):
                return False
        digits = digits_of(self.params)
        if present(digits or ()) != bytes([True]) * (len(self.params) if self._has_digits else 0):
            return False
        self.tensors.digits = list(digits) if digits else None  # type: ignore[arg-type]
        self.tensors.grads = list(itertools.compress(grads, self.chosen))  # type: ignore[arg-type]
        return _form(self.tensors.grads) == self._form and _are_at(
            self.tensors.all_tensors(), self.tensors.addresses, self._indices
        )

    def run(self, *args: Any) -> None:
        """Call the kernel with its tensors and ``args``."""
        try:
            self.update(self.tensors, *args)
        finally:
            self.tensors.grads, self.tensors.digits = [], None


@dataclass
class GroupPlan:
    """The kernel calls of one group."""

    settings: tuple[object, ...]
    """Objects on which the calls depend, compared by identity."""
    params: list[Tensor]
    has_grad: bytes
    """For each parameter, 1 if it has a gradient."""
    states: list[State]
    """Those of all groups: to compare them all is cheaper than to look up some."""
    calls: list[KernelCall]

    def take(
        self,
        settings: tuple[object, ...],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: Mapping[Tensor, State],
        digits_of: DigitsOf,
    ) -> bool:
        """Use ``grads`` and the digits if a new plan would have the same calls. Return whether."""
        if (
            not _same(settings, self.settings)
            or (len(params), len(state)) != (len(self.params), len(self.states))
            or not _same(params, self.params)
            or not _same(state.values(), self.states)
            or present(grads) != self.has_grad
        ):
            return False
        try:
            return all(call.take(grads, digits_of) for call in self.calls)
        except RuntimeError:  # a sparse gradient has no address
            return False

    def inherit(self, previous: "GroupPlan") -> None:
        """Take over what kernels have prepared in ``previous`` for the same addresses."""
        for call, old in itertools.product(self.calls, previous.calls):
            if _layout(call.tensors) == _layout(old.tensors) and all(call.tensors.are_contiguous()):
                call.tensors.launch = old.tensors.launch


def present(tensors: Iterable[Tensor | None]) -> bytes:
    """For each of ``tensors``, 1 if it is not None."""
    return bytes(map(operator.is_not, tensors, itertools.repeat(None)))


def _same(values: Iterable[object], others: Iterable[object]) -> bool:
    return all(map(operator.is_, values, others))


def _compare_addresses(tensors: list[Tensor], addresses: list[int], indices: list[int]) -> bool:
    return list(map(Tensor.data_ptr, tensors)) == addresses


# The same for tensors[i] and addresses[i] with each i of indices, four times as fast; in torch built for CUDA.
_are_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", _compare_addresses)


def _form(grads: list[Tensor]) -> tuple[object, ...]:
    return set(map(_dtype, grads)), bytes(map(Tensor.is_contiguous, grads))


def _layout(tensors: StepTensors) -> tuple[object, ...]:
    return tensors.kind, tensors.addresses, tensors.numels, tensors.blocks
