"""Call an update function with lists of tensors and named scalars, without building its arguments in each test."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_lion.step import LionUpdate, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_

Lists = Sequence[Tensor]


def run(
    update: LionUpdate, masters: Lists, grads: Lists, exp_avgs: Lists, telemetry: Telemetry | None = None, **rest: Any
) -> None:
    """Run ``update`` once. ``rest`` are further lists of :class:`StepTensors` and fields of :class:`StepScalars`."""
    scalars = StepScalars(**{name: rest.pop(name) for name in StepScalars._fields if name in rest})
    update(StepTensors(list(masters), list(grads), list(exp_avgs), **rest), scalars, telemetry)


def reference(masters: Lists, grads: Lists, exp_avgs: Lists, **rest: Any) -> None:
    """:func:`run` with the reference implementation."""
    run(lion_update_, masters, grads, exp_avgs, **rest)
