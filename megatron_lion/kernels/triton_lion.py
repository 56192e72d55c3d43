"""Lion in one pass over a GPU's memory with Triton: one or two launches for all tensors of an update.

Tested in Triton's interpreter (``TRITON_INTERPRET=1``) and compiled for GPUs (docs/gpu.md). It has not run on a GPU.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from megatron_lion.kernels.digits import lion_update_with_digits_, refuse_skip
from megatron_lion.kernels.fused import supports_dtypes
from megatron_lion.kernels.triton_lion_kernel import SIZE, lion_kernel
from megatron_lion.kernels.triton_lion_table import LaunchTable, digit_addresses, launch_table
from megatron_lion.step import StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry

# bf16 is read and written as integers: Triton's interpreter flushes bf16 denormals and rounds its casts differently.
MAY_BE_ON_DEVICE = ("lr", "weight_decay", "grad_scale")  # in the order of the kernel's ON_DEVICE
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.uint16, torch.int8: tl.int8}


@torch.no_grad()
def lion_update_triton_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_` in one pass for any number of tensors; the same bits, in place.

    One launch updates whole blocks of 1,024 elements, a second one the tails and what is not aligned to 16 bytes. The
    first call on ``tensors`` copies their addresses to the device and keeps them in ``tensors.launch``. Later calls
    copy nothing from the host, so make one call before a capture, and keep ``tensors`` as long as the captured graph.

    ``tensors.digits`` may be anywhere in each call: their addresses are compared, and copied if they have changed.

    Scalars in tensors on the device, and ``skip``, are read there, so that a captured graph follows what is written to
    them later. Scalars in tensors on the CPU are read on the host. ``telemetry`` is summed in the same launches and
    read back with one wait, so it cannot be captured. Parameters with tensors that are not contiguous go to the
    reference. Issues no collective.

    Raises:
        LionError: the first call on ``tensors`` is inside a capture; nothing was written.
        ValueError: unsupported dtypes, a scalar on another device, or digits of a step with ``skip``; nothing was
            written.
    """
    refuse_skip(tensors, scalars)
    kind = tensors.kind
    if kind is None or not any(tensors.numels):
        return
    if not supports_dtypes(kind):
        raise ValueError(f"the Triton kernel does not support {kind}; use kernels.choose")
    if tensors.launch is None and not all(contiguous := tensors.are_contiguous()):
        others = tensors.select([not entry for entry in contiguous])
        lion_update_with_digits_(others, scalars, telemetry)
        lion_update_triton_(tensors.select(contiguous), scalars, telemetry)
        return
    arguments = _arguments(kind, scalars)
    # Triton launches on the current device.
    with torch.cuda.device_of(tensors.masters[0]):  # type: ignore[no-untyped-call]
        table = tensors.launch
        if not isinstance(table, LaunchTable) or table.digits != digit_addresses(tensors):
            tensors.launch = table = launch_table(tensors)
        skip = table.never if scalars.skip is None else _on(kind.device, scalars.skip)
        outputs = {"TELEMETRY": telemetry is not None, "DIGITS": tensors.digits is not None}
        sums = _launch(table, {**arguments, **outputs, "skip": skip})
    # Autograd did not see the writes. A backward pass that saved old values must fail, not use the new ones.
    torch.autograd.graph.increment_version([*tensors.masters, *(tensors.model_copies or ())])
    if telemetry is not None:
        _merge(telemetry, sums, skip, sum(tensors.numels))


def _launch(table: LaunchTable, arguments: dict[str, Any]) -> Tensor:
    """Launch for whole blocks and for the rest, where there are any. Return the sums of each program."""
    programs = len(table.whole) + len(table.rest) if arguments["TELEMETRY"] else 0
    sums = torch.zeros(programs, 6, dtype=torch.float64, device=table.rows.device)
    has_more = bool(arguments["TELEMETRY"] or arguments["DIGITS"] or arguments["ON_DEVICE"])
    for is_whole, tensor_of in ((True, table.whole), (False, table.rest)):
        if len(tensor_of):
            lion_kernel[(len(tensor_of),)](
                table.rows,
                tensor_of,
                sums=sums if is_whole else sums[len(table.whole) :],
                WHOLE=is_whole,
                SIZE=SIZE,
                **compiler_options(is_plain=is_whole and not has_more),
                **arguments,
            )
    return sums


def compiler_options(*, is_plain: bool) -> dict[str, Any]:
    """Triton's options for a launch. Plain is one of whole blocks without telemetry, digits and scalars on the device.

    Products and sums are rounded separately. Without a limit, ptxas spills registers of some launches that are not
    plain to use fewer than it could.
    """
    return {"enable_fp_fusion": False, **({} if is_plain else {"maxnreg": 255})}


def _merge(telemetry: Telemetry, sums: Tensor, skip: Tensor, elements: int) -> None:
    """Add the programs' sums to ``telemetry``, unless the step was skipped."""
    results = torch.cat([sums[:, :5].sum(0), sums[:, 5].max().view(1), skip.view(1)])  # read with one wait
    l1, l2_squared, inner, zeros, flipped, linf_param, skipped = results.tolist()
    if not skipped:
        telemetry.merge(Telemetry(elements, l1, l2_squared, inner, int(zeros), int(flipped), linf_param))


def _arguments(kind: StepKind, scalars: StepScalars) -> dict[str, Any]:
    """The kernel's arguments from dtypes and scalars."""
    beta1, beta2 = scalars.beta1, scalars.beta2
    on_device = {name: _number(kind.device, getattr(scalars, name)) for name in MAY_BE_ON_DEVICE}
    return {
        **on_device,
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "ON_DEVICE": sum(isinstance(on_device[name], Tensor) << bit for bit, name in enumerate(MAY_BE_ON_DEVICE)),
        **compile_time(kind),
    }


def compile_time(kind: StepKind) -> dict[str, Any]:
    """The kernel's compile-time arguments for tensors of ``kind``."""
    return {
        "PARAM": TYPES[kind.masters],
        "GRAD": TYPES[kind.grads],
        "MOMENTUM": TYPES[kind.exp_avgs],
        "COPY": kind.model_copies is not None,
        "REMAINDER": kind.remainders is not None,
        "PACKED": kind.scales is not None,
    }


def _number(device: torch.device, value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor) and (value.device == device or value.device.type != "cpu"):
        return _on(device, value)
    return float(value)


def _on(device: torch.device, value: Tensor) -> Tensor:
    if value.device != device:
        raise ValueError(f"scalars of an update of tensors on {device} must be there or on the CPU, got {value.device}")
    return value
