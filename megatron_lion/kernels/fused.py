"""Lion in one pass over memory on a CPU: a list of tensors in one call of the compiled kernel."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lion.kernels import compiler
from megatron_lion.precision import Place
from megatron_lion.update import lion_update_

STORED = (torch.float32, torch.bfloat16)


def fused_problem() -> str | None:
    """Why the CPU kernel cannot be used on this machine, or None. Compiles it where that has not been done yet."""
    try:
        compiler.load()
    except compiler.CompilerUnavailable as error:
        return str(error)
    return None


def fused_supports(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> bool:
    """Whether all tensors are on the CPU, and those of each role of one dtype, fp32 or bf16."""
    for tensors in (params, grads, exp_avgs):
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes.issubset(STORED) or any(t.device.type != "cpu" for t in tensors):
            return False
    return True


@torch.no_grad()
def lion_update_fused_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    copies: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor] | None = None,
    places: Sequence[Place] | None = None,
) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`fused_supports`; the same bits, in place.

    Uses ``torch.get_num_threads()`` threads and no temporary memory. Tensors that are not contiguous are left to the
    reference; ``copies`` must be bf16. Raises RuntimeError where :func:`fused_problem` has a reason.
    """
    if remainders is not None or scales is not None:
        raise ValueError("this kernel takes no packed state: use the reference")
    roles = [params, grads, exp_avgs] if copies is None else [params, grads, exp_avgs, copies]
    rows = list(zip(*roles, strict=True))
    dense = [row for row in rows if all(tensor.is_contiguous() for tensor in row)]
    if len(dense) < len(rows):
        for row in (row for row in rows if not all(tensor.is_contiguous() for tensor in row)):
            lion_update_(
                *([tensor] for tensor in row[:3]),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                grad_scale=grad_scale,
                copies=None if copies is None else [row[3]],
            )
    if not dense:
        return
    if any(tensor.numel() != row[0].numel() for row in dense for tensor in row):
        raise ValueError("parameter, gradient, momentum and copy differ in size")
    addresses = array("Q", [tensor.data_ptr() for row in dense for tensor in row])
    counts = array("q", [row[0].numel() for row in dense])
    compiler.load().lion_cpu_update(
        ctypes.c_int64(len(dense)),
        ctypes.c_void_p(addresses.buffer_info()[0]),
        ctypes.c_void_p(counts.buffer_info()[0]),
        *(ctypes.c_int(tensor.dtype == torch.bfloat16) for tensor in dense[0][:3]),
        ctypes.c_int(copies is not None),
        *(ctypes.c_double(value) for value in (lr, beta1, beta2, weight_decay, grad_scale)),
        ctypes.c_int(torch.get_num_threads()),
    )
    # The writes were made behind autograd's back: a backward pass that needs the old values must still fail.
    torch.autograd.graph.increment_version([tensor for row in dense for tensor in (row[0], *row[2:])])
