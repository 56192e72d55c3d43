"""Sum of the squares of gradients in one pass over memory on a CPU, by the compiled kernel."""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lion.kernels import compiler

SOURCE = compiler.SOURCE.with_name("norm_cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)


def norm_cpu_problem() -> str | None:
    """Why the kernel cannot be used on this machine, or None. Compiles it if that has not been done yet."""
    return compiler.problem(SOURCE)


def norm_cpu_supports(tensors: Sequence[Tensor]) -> bool:
    """Whether all of ``tensors`` are contiguous, on the CPU, and fp32 or bf16."""
    return all(t.device.type == "cpu" and t.dtype in DTYPES and t.is_contiguous() for t in tensors)


@torch.no_grad()
def sum_of_squares_cpu(tensors: Sequence[Tensor]) -> float:
    """sum over all elements x of ``tensors`` of x * x; 0 if there are none. A NaN or an infinity remains one.

    Relative error at most 1.2e-6, typically 1e-8: 16 squares are added in fp32, and such sums in fp64.
    Tensors have any shapes, and :func:`norm_cpu_supports` them. Uses ``torch.get_num_threads()`` threads. The result
    does not depend on their number: sums of 65,536 elements are added in the order of the tensors, fp32 before bf16.
    Issues no collective.

    Raises:
        ValueError: unsupported tensors.
        CompilerUnavailable: :func:`norm_cpu_problem` has a reason.
    """
    if not norm_cpu_supports(tensors):  # an address on a device would crash the process
        found = sorted({f"{t.dtype} on {t.device}" for t in tensors})
        raise ValueError(f"the norm's CPU kernel needs contiguous fp32 or bf16 tensors on the CPU, got {found}")
    kernel = _kernel()
    total = 0.0
    for dtype in DTYPES:
        chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
        addresses, counts = array("Q", map(Tensor.data_ptr, chosen)), array("q", map(Tensor.numel, chosen))
        lists = (values.buffer_info()[0] for values in (addresses, counts))
        total += kernel(len(chosen), *lists, dtype == torch.bfloat16, torch.get_num_threads())
    return total


def _kernel() -> Any:
    function = compiler.load(SOURCE).sum_of_squares_cpu
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return function
