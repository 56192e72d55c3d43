"""The self-check's problem: values and positions at which kernels fail, between guard zones, and the comparison.

The tensors of each role are in one buffer, with unused elements between them. Whole buffers are compared, so a write
outside of a tensor is found as well.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lion.kernels.digits import lion_update_with_digits_
from megatron_lion.precision import BlockLayout, quantize, split_master
from megatron_lion.step import ROLES, LionUpdate, StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry

Buffers = dict[str, Tensor]

GUARD = 64  # unused elements around each tensor
INF = float("inf")
SPECIAL = (0.0, 2.0**-126, -(2.0**-129), 1.0, -1.0, 1e-3, -1e-3, 1e30, -1e30, INF, -INF, float("nan"), -0.0)
# Elements of each tensor, how far its start is from an aligned one, and its block layout: odd sizes, slices that are
# not aligned, rows that are not a multiple of a block, pieces that begin and end in the middle of a row or of a block.
SMALL = [
    *((numel, 0, BlockLayout(0, max(numel, 1))) for numel in (1, 0, 31, 33, 1023, 1025)),
    (1030, 1, BlockLayout(0, 1030)),
    (300, 3, BlockLayout(64, 96)),
    (3000, 0, BlockLayout(0, 1000)),
    (2500, 0, BlockLayout(1032, 1000)),
    (70, 0, BlockLayout(7, 96)),
]
SPECIALS = len(SPECIAL) ** 3
# The first one has many exact ties, where the direction is zero.
STEPS = (
    StepScalars(lr=2**-4, beta1=0.5, beta2=0.75, weight_decay=0.5),
    StepScalars(lr=5e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, grad_scale=0.37),
    StepScalars(lr=1e-3, beta1=0.95, beta2=0.98, weight_decay=0.0),
)
ON_DEVICE = 1  # index of the step with its scalars in tensors, and with telemetry
DIGITS = 2  # index of the step that also leaves its digits


class Span(NamedTuple):
    """Position of one tensor in its buffers."""

    start: int
    numel: int
    scales_start: int
    layout: BlockLayout

    @property
    def scales(self) -> slice:
        """Position of its scales."""
        return slice(self.scales_start, self.scales_start + self.layout.count(self.numel))

    @property
    def elements(self) -> slice:
        """Position of its elements."""
        return slice(self.start, self.start + self.numel)


def first_difference(update: LionUpdate, kind: StepKind, numel: int, *, telemetry: bool = True) -> str | None:
    """Run ``update`` and the reference on ``kind.device``, and the reference on the CPU. None if all bits are equal.

    The largest tensor has ``numel`` elements; on the CPU it is left out. Three steps with different scalars, one of
    them with scalars on the device and, if asked, telemetry, and one with digits; then one that is to be skipped. The
    result names the first role, tensor and element that differ. Issues no collective.
    """
    spans = _spans([*SMALL, (SPECIALS, 0, BlockLayout(0, SPECIALS)), (numel, 0, BlockLayout(0, 4096))])
    on_cpu = _filled(kind, spans)
    got, expected = ({role: flat.to(kind.device, copy=True) for role, flat in on_cpu.items()} for _ in range(2))
    end = {role: spans[-1].scales_start if role == "scales" else spans[-1].start for role in got}
    for number, step in enumerate(STEPS):
        scalars = _on_device(kind, step) if number == ON_DEVICE else step
        measures = telemetry and number == ON_DEVICE
        sums: list[Telemetry | None] = [Telemetry(), Telemetry()] if measures else [None, None]
        for buffers, kernel, total in zip((got, expected), (update, lion_update_with_digits_), sums, strict=True):
            _step(kernel, buffers, spans, scalars, total, digits=number == DIGITS)
        _step(lion_update_with_digits_, on_cpu, spans[:-1], step, digits=number == DIGITS)
        start = {role: got[role][: end[role]].cpu() for role in got}
        expected_start = {role: flat[: end[role]] for role, flat in on_cpu.items()}
        found = (
            _difference(got, expected, spans)
            or (f"{text} (the reference on the CPU)" if (text := _difference(start, expected_start, spans)) else None)
            or _different_sums(*sums)
        )
        if found:
            return f"step {number + 1}: {found}"
    _step(update, got, spans, _on_device(kind, STEPS[0], skip=1))
    found = _difference(got, expected, spans)
    return f"a skipped step: {found}" if found else None


def elements(numel: int) -> int:
    """Elements of all tensors of the problem with the same ``numel``."""
    return sum(entry[0] for entry in SMALL) + SPECIALS + numel


def _spans(tensors: Iterable[tuple[int, int, BlockLayout]]) -> list[Span]:
    spans, start, scales_start = [], GUARD, GUARD
    for numel, shift, layout in tensors:
        spans.append(Span(start + shift, numel, scales_start, layout))
        start += (shift + numel) // GUARD * GUARD + 2 * GUARD
        scales_start += layout.count(numel) + GUARD
    return spans


def _filled(kind: StepKind, spans: list[Span]) -> Buffers:
    """The buffers of each role of ``kind``, and of digits, on the CPU, the same at each call."""
    size = spans[-1].elements.stop + GUARD
    theta, grad, momentum = _values(size)
    special = torch.tensor(SPECIAL)
    cells = torch.cartesian_prod(special, special, special)
    # The momentum changes slowest and the parameter fastest, so that blocks without a NaN remain.
    for column, flat in enumerate((momentum, grad, theta)):
        flat[spans[-2].elements] = cells[:, column]
    buffers = {"masters": theta.to(kind.masters), "grads": grad.to(kind.grads)}
    if kind.remainders is not None:
        buffers["masters"], buffers["remainders"] = split_master(theta)
    if kind.model_copies is not None:
        buffers["model_copies"] = torch.full((size,), 0.5, dtype=kind.model_copies)
    if kind.scales is None:
        buffers["exp_avgs"] = momentum.to(kind.exp_avgs)
    else:
        codes = torch.full((size,), 77, dtype=kind.exp_avgs)
        scales = torch.full((spans[-1].scales.stop + GUARD,), 0.5, dtype=kind.scales)
        for span in spans:
            codes[span.elements], scales[span.scales] = quantize(momentum[span.elements], span.layout)
        buffers |= {"exp_avgs": codes, "scales": scales}
    digits = {"digits": torch.full((size,), 77, dtype=torch.uint8)}
    return {role: buffers[role] for role in ROLES if role in buffers} | digits


def _values(size: int) -> list[Tensor]:
    """fp32 parameters, gradients and momenta: a grid with many ties, all magnitudes, and sums that nearly cancel."""
    generator = torch.Generator().manual_seed(20250923)

    def uniform(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator).float()

    which = torch.arange(size) // 37 % 3
    values = []
    for _ in range(3):
        grid = uniform(-32, 33) / 16
        wide = torch.randn(size, generator=generator) * torch.exp2(uniform(-140, 60))
        values.append(torch.where(which == 0, grid, wide))
    theta, grad, momentum = values
    normal = torch.randn(size, generator=generator)
    grad = torch.where(which == 2, -9.0 * normal * (1.0 + uniform(-3, 4) * 2.0**-23), grad)
    return [torch.where(which == 2, normal.flip(0), theta), grad, torch.where(which == 2, normal, momentum)]


def _on_device(kind: StepKind, step: StepScalars, skip: int = 0) -> StepScalars:
    """``step`` with tensors for all scalars that may be tensors, rounded to fp32 as the kernels take them."""

    def on_device(value: float | Tensor) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=kind.device)

    return step._replace(
        lr=on_device(step.lr),
        weight_decay=on_device(step.weight_decay),
        grad_scale=on_device(step.grad_scale),
        skip=torch.tensor([skip], dtype=torch.int32, device=kind.device),
    )


def _step(
    update: LionUpdate,
    buffers: Buffers,
    spans: list[Span],
    scalars: StepScalars,
    telemetry: Telemetry | None = None,
    *,
    digits: bool = False,
) -> None:
    """One call for tensors with finite values, with ``telemetry`` and ``digits``, and one for the special values."""
    special = [span for span in spans if span.numel == SPECIALS]
    for chosen, sums in (([span for span in spans if span not in special], telemetry), (special, None)):
        has_digits = digits and chosen is not special  # a NaN may have other digits, with which replays are right too
        roles = {
            role: [flat[span.scales if role == "scales" else span.elements] for span in chosen]
            for role, flat in buffers.items()
            if role != "digits" or has_digits
        }
        blocks = [span.layout for span in chosen] if "scales" in buffers else None
        update(StepTensors(**roles, blocks=blocks), scalars, sums)


def _difference(got: Buffers, expected: Buffers, spans: list[Span]) -> str | None:
    for role, flat in got.items():
        same = _bits(flat) == _bits(expected[role])
        if flat.dtype.is_floating_point:
            same |= flat.isnan() & expected[role].isnan()
        if not same.all():
            index = int(same.logical_not().nonzero()[0])
            values = f"got {_shown(flat[index])}, expected {_shown(expected[role][index])}"
            return f"{role}{_position(role, index, spans)}: {values}"
    return None


def _position(role: str, index: int, spans: list[Span]) -> str:
    for number, span in enumerate(spans):
        where = span.scales if role == "scales" else span.elements
        if where.start <= index < where.stop:
            return f"[{number}][{index - where.start}], in a tensor of {where.stop - where.start} elements"
    return f": element {index} of the buffer, outside of every tensor"


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return tensor.view(integers[tensor.element_size()])


def _shown(value: Tensor) -> str:
    bits = int(_bits(value.reshape(1))) % (1 << 8 * value.element_size())
    return f"{value.item():g} (0x{bits:0{2 * value.element_size()}x})"


def _different_sums(got: Telemetry | None, expected: Telemetry | None) -> str | None:
    """Counts must be equal; sums may be rounded in another order."""
    if got is None or expected is None:
        return None
    tolerance = {"l1": 0.0, "l2_squared": 0.0, "inner": 1e-9 * expected.l1}
    for (name, one), two in zip(asdict(got).items(), asdict(expected).values(), strict=True):
        equal = math.isclose(one, two, rel_tol=1e-9, abs_tol=tolerance[name]) if name in tolerance else one == two
        if not equal:
            return f"telemetry's {name}: got {one!r}, expected {two!r}"
    return None
