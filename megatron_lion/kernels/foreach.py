"""Lion on lists of tensors with torch's ``_foreach`` operations: few launches on a GPU, few Python calls on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lion.precision import Place

# torch's foreach kernels take lists; a long list of temporaries would double the peak memory of a step.
MAX_NUMEL_PER_CALL = 1 << 26


def foreach_supports(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> bool:
    """Whether all tensors share one device and one dtype that is also the dtype of the arithmetic (fp32 or fp64)."""
    kinds = {(t.device, t.dtype) for tensors in (params, grads, exp_avgs) for t in tensors}
    return len(kinds) == 1 and kinds.pop()[1] in (torch.float32, torch.float64)


@torch.no_grad()
def lion_update_foreach_(
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
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`foreach_supports`; the same bits, in place.

    Needs two temporaries, three where ``grad_scale`` is not 1, of at most ``MAX_NUMEL_PER_CALL`` elements (or of the
    largest tensor, where that is larger).
    """
    if remainders is not None or scales is not None:
        raise ValueError("this kernel takes no packed state: use the reference")
    for chunk in _chunks(params):
        p, m = list(params[chunk]), list(exp_avgs[chunk])
        g: list[Tensor] | tuple[Tensor, ...] = list(grads[chunk])
        if grad_scale != 1.0:
            g = torch._foreach_mul(g, grad_scale)
        step = torch._foreach_mul(m, beta1)
        term = torch._foreach_mul(g, 1.0 - beta1)
        torch._foreach_add_(step, term)
        torch._foreach_sign_(step)
        del term
        term = torch._foreach_mul(p, weight_decay)
        torch._foreach_add_(step, term)
        torch._foreach_mul_(step, lr)
        torch._foreach_sub_(p, step)
        del step, term
        term = torch._foreach_mul(g, 1.0 - beta2)
        torch._foreach_mul_(m, beta2)
        torch._foreach_add_(m, term)
        if copies is not None:
            torch._foreach_copy_(list(copies[chunk]), p)


def _chunks(params: Sequence[Tensor]) -> list[slice]:
    """Consecutive slices of ``params``, each of one tensor or of at most ``MAX_NUMEL_PER_CALL`` elements."""
    chunks, start, numel = [], 0, 0
    for index, param in enumerate(params):
        if index > start and numel + param.numel() > MAX_NUMEL_PER_CALL:
            chunks.append(slice(start, index))
            start, numel = index, 0
        numel += param.numel()
    if start < len(params):
        chunks.append(slice(start, len(params)))
    return chunks
