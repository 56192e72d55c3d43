"""Reference implementation of the Lion update. All kernels must match it bit for bit.

Algorithm 1 of Dong, Li, Lin (2025), "Convergence Rate Analysis of LION", after Chen et al. (2023), arXiv 2302.06675::

    c_k         = beta1 * m_{k-1} + (1 - beta1) * g_k
    theta_{k+1} = theta_k - lr * (sign(c_k) + weight_decay * theta_k)
    m_k         = beta2 * m_{k-1} + (1 - beta2) * g_k

with sign(0) = 0, and decoupled weight decay on the old theta.

Rounding is part of the definition. Every product and every sum is rounded separately, in the order written. There is no
``alpha=``, no ``lerp`` and no fused multiply-add: each of those rounds differently, and where c is within rounding of
zero, another rounding gives another sign. Arithmetic is fp32, or fp64 for fp64 parameters. Parameter and momentum are
rounded to their storage format once, at the end (:mod:`megatron_lion.precision`).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lion.precision import BlockLayout, dequantize, join_master, quantize, split_master
from megatron_lion.step import StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic for ``param``: fp64 for fp64, otherwise fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def lion_sign(grad: Tensor, exp_avg: Tensor, beta1: float) -> Tensor:
    """sign(c_k). ``grad`` and ``exp_avg`` must have the dtype of the arithmetic, as the result does."""
    return torch.sign(exp_avg * beta1 + grad * (1.0 - beta1))


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One step of Lion for one tensor, out of place.

    Args:
        param: theta_k, any shape, a floating-point dtype.
        grad: g_k, the same shape, any floating-point dtype.
        exp_avg: m_{k-1}, the same shape, any floating-point dtype.
        lr: step size. Every element with c != 0 moves by lr, apart from weight decay.
        beta1: weight of the momentum in the direction c_k.
        beta2: decay of the momentum.
        weight_decay: decoupled, multiplied by lr.

    Returns:
        theta_{k+1} and m_k in the dtype of the arithmetic (:func:`compute_dtype`), not yet rounded for storage.
    """
    dtype = compute_dtype(param)
    theta, g, m = param.to(dtype), grad.to(dtype), exp_avg.to(dtype)
    step = lion_sign(g, m, beta1) + theta * weight_decay
    return theta - step * lr, m * beta2 + g * (1.0 - beta2)


@torch.no_grad()
def lion_update_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """Apply :func:`lion_step` to each parameter, in place.

    Args:
        tensors: all but ``grads`` and ``blocks`` are modified.
        scalars: ``grad_scale`` multiplies every gradient in the dtype of the arithmetic first. That product is rounded
            as well. Scalars in tensors are read on the host.
        telemetry: this step's sums are added to it.

    Issues no collective.
    """
    if scalars.skips():
        return
    lr, beta1, beta2, weight_decay, grad_scale = scalars.on_host()
    for master, grad, exp_avg, model_copy, remainder, scale, layout in tensors.entries():
        grad, momentum = inputs(master, grad, exp_avg, scale, layout, grad_scale)
        theta = master if remainder is None else join_master(master, remainder)
        new_theta, new_momentum = lion_step(
            theta, grad, momentum, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay
        )
        if telemetry is not None:
            telemetry.add_direction(lion_sign(grad, momentum, beta1), grad, momentum)
            telemetry.add_param(new_theta)
        _store(master, remainder, new_theta, split_master)
        _store(exp_avg, scale, new_momentum, functools.partial(quantize, layout=layout))
        if model_copy is not None:
            model_copy.copy_(new_theta)


def inputs(
    master: Tensor, grad: Tensor, exp_avg: Tensor, scale: Tensor | None, layout: BlockLayout, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """The scaled gradient and the momentum of one of :meth:`StepTensors.entries`, in the dtype of the arithmetic."""
    dtype = compute_dtype(master)
    grad = grad.to(dtype) if grad_scale == 1.0 else grad.to(dtype) * grad_scale
    return grad, exp_avg.to(dtype) if scale is None else dequantize(exp_avg, scale, layout)


def _store(
    stored: Tensor, rest: Tensor | None, value: Tensor, split: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Write ``value`` into ``stored``, rounded to its dtype; or ``split`` it into ``stored`` and ``rest``."""
    if rest is None:
        stored.copy_(value)
    else:
        for part, new in zip((stored, rest), split(value), strict=True):
            part.copy_(new)
