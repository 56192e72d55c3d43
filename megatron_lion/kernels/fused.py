"""Lion in one pass over memory on a CPU: all tensors of an update in one call of the compiled kernel."""

import ctypes
import itertools
from array import array
from typing import Any

import torch
from torch import Tensor

from megatron_lion.kernels import compiler
from megatron_lion.kernels.digits import lion_update_with_digits_, refuse_skip
from megatron_lion.step import ROLES, StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry

# The kernel's numbers for storage formats (Kind in lion_cpu.cpp).
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
PACKED = 2


def fused_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it if that has not been done yet."""
    return compiler.problem()


def supports_dtypes(kind: StepKind) -> bool:
    """Whether a one-pass kernel supports these dtypes: fp32 and bf16, momentum also int8, model copies only bf16."""
    plain = FORMATS.keys()
    return (
        {kind.masters, kind.grads} <= plain
        and kind.exp_avgs in plain | {torch.int8}
        and kind.model_copies in (None, torch.bfloat16)
    )


def fused_supports(kind: StepKind) -> bool:
    """Whether the CPU kernel supports tensors of ``kind``."""
    return kind.device.type == "cpu" and supports_dtypes(kind)


@torch.no_grad()
def lion_update_fused_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`fused_supports`; the same bits, in place.

    Uses ``torch.get_num_threads()`` threads and no temporary memory. Parameters with tensors that are not contiguous
    go to the reference. Issues no collective. Raises ValueError for unsupported tensors, RuntimeError if
    :func:`fused_problem` has a reason; then nothing was written.
    """
    refuse_skip(tensors, scalars)
    if tensors.kind is None or scalars.skips():
        return
    if not fused_supports(tensors.kind):  # an address on a device would crash the process
        raise ValueError(f"the CPU kernel does not support {tensors.kind}; use kernels.choose")
    macros = {"TELEMETRY": telemetry, "DIGITS": tensors.digits}
    kernel = _kernel(*(name for name, wanted in macros.items() if wanted is not None))
    contiguous = tensors.are_contiguous()
    if not all(contiguous):
        others = tensors.select([not entry for entry in contiguous])
        lion_update_with_digits_(others, scalars, telemetry)
        tensors = tensors.select(contiguous)
    if tensors.kind is not None:
        _update_contiguous(kernel, tensors, tensors.kind, scalars, telemetry)


def _update_contiguous(
    kernel: Any, tensors: StepTensors, kind: StepKind, scalars: StepScalars, telemetry: Telemetry | None
) -> None:
    addresses, roles = array("Q"), tensors.roles()
    if tensors.digits is not None:
        roles["digits"] = tensors.digits
    for name in (*ROLES, "digits"):
        absent = itertools.repeat(0, len(tensors.masters))
        addresses.extend(map(Tensor.data_ptr, roles[name]) if name in roles else absent)
    blocks = array("q", itertools.chain.from_iterable(tensors.blocks or ()))
    numbers = array("d", scalars.on_host())
    sums = array("d", [0.0] * 6)
    kernel(
        len(tensors.masters),
        *(values.buffer_info()[0] for values in (addresses, tensors.numels, blocks, numbers)),
        PACKED if kind.remainders else FORMATS[kind.masters],
        FORMATS[kind.grads],
        PACKED if kind.scales else FORMATS[kind.exp_avgs],
        kind.model_copies is not None,
        torch.get_num_threads(),
        sums.buffer_info()[0],
    )
    if telemetry is not None:
        l1, l2_squared, inner, zeros, flipped, linf_param = sums
        elements = sum(tensors.numels)
        telemetry.merge(Telemetry(elements, l1, l2_squared, inner, int(zeros), int(flipped), linf_param))
    # Autograd did not see the writes. A backward pass that saved old values must fail, not use the new ones.
    written = [role for name, role in roles.items() if name != "grads"]
    torch.autograd.graph.increment_version(list(itertools.chain.from_iterable(written)))


def _kernel(*macros: str) -> Any:
    """``lion_cpu_update`` of lion_cpu.cpp, compiled with ``macros``, as a function of Python numbers and addresses."""
    function = compiler.load(compiler.SOURCE, *macros).lion_cpu_update
    function.restype = None
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 5, ctypes.c_void_p]
    return function
