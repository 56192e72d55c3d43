"""Lion's update rule: the readable truth that every faster version must equal bit for bit.

Algorithm 1 of Dong, Li, Lin (2025), "Convergence Rate Analysis of LION", after Chen et al. (2023), arXiv 2302.06675::

    c_k         = beta1 * m_{k-1} + (1 - beta1) * g_k
    theta_{k+1} = theta_k - lr * (sign(c_k) + weight_decay * theta_k)
    m_k         = beta2 * m_{k-1} + (1 - beta2) * g_k

with sign(0) = 0, and decoupled weight decay on the old theta.

Rounding is part of the definition. Every product and every sum is rounded on its own, in the order written: no
``alpha=``, no ``lerp``, no fused multiply-add, because each of those rounds differently, and where c is within
rounding of zero another rounding is another sign. Arithmetic is fp32, for fp64 parameters fp64; parameter and momentum
are rounded to what they are stored in once, at the end (:mod:`megatron_lion.precision`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_lion.precision import Place, dequantise, join_master, quantise, split_master
from megatron_lion.telemetry import Telemetry


class LionUpdate(Protocol):
    """The signature shared by :func:`lion_update_` and every kernel that stands in for it."""

    def __call__(
        self,
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
        telemetry: Telemetry | None = None,
    ) -> None: ...


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic for ``param``: fp64 for fp64, otherwise fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def lion_sign(grad: Tensor, exp_avg: Tensor, beta1: float) -> Tensor:
    """sign(c_k), where c_k is in the dtype of the arithmetic, as ``grad`` and ``exp_avg`` must be."""
    return torch.sign(exp_avg * beta1 + grad * (1.0 - beta1))


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One step of Lion for one tensor, out of place.

    Args:
        param: theta_k, any shape, a floating-point dtype.
        grad: g_k, the same shape, any floating-point dtype.
        exp_avg: m_{k-1}, the same shape, any floating-point dtype.
        lr: the step size; every element with c != 0 moves by lr, up to weight decay.
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
def lion_update_(
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
    telemetry: Telemetry | None = None,
) -> None:
    """Apply :func:`lion_step` to each tensor; ``params`` and ``exp_avgs`` are modified in place, ``grads`` is not.

    ``grad_scale``, such as a clip factor, multiplies every gradient in the dtype of the arithmetic first; that product
    is rounded as well. The sequences correspond element by element. Tensors may be empty. Issues no collective. Raises
    ValueError where the sequences differ in length.

    Where given, and modified in place as well:

    - ``copies``: each receives its new parameter rounded from the arithmetic to its own dtype, as a model's 16-bit
      parameter does from its fp32 master.
    - ``remainders``, int16: ``params`` are bf16, and the fp32 masters are
      :func:`~megatron_lion.precision.join_master` of the two.
    - ``scales``, bf16, one a block: ``exp_avgs`` are int8 codes, the momenta
      :func:`~megatron_lion.precision.dequantise` of the two. ``places`` says where in its parameter each tensor lies
      (read only); without it each is a whole parameter.
    - ``telemetry``: this step's sums are added to it.
    """
    none: list[None] = [None] * len(params)
    optional = (copies or none, remainders or none, scales or none, places or none)
    for param, grad, exp_avg, copy, remainder, scale, place in zip(params, grads, exp_avgs, *optional, strict=True):
        place = place or Place.of_whole(param)
        dtype = compute_dtype(param)
        grad = grad.to(dtype) if grad_scale == 1.0 else grad.to(dtype) * grad_scale
        momentum = exp_avg.to(dtype) if scale is None else dequantise(exp_avg, scale, place)
        new_param, new_exp_avg = lion_step(
            param if remainder is None else join_master(param, remainder),
            grad,
            momentum,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
        )
        if telemetry is not None:
            telemetry.add_direction(lion_sign(grad, momentum, beta1), grad, momentum)
            telemetry.add_param(new_param)
        _store(param, remainder, new_param, split_master)
        _store(exp_avg, scale, new_exp_avg, functools.partial(quantise, place=place))
        if copy is not None:
            copy.copy_(new_param)


def _store(stored: Tensor, rest: Tensor | None, value: Tensor, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Write ``value`` into ``stored``, rounded to its dtype, or into ``stored`` and ``rest`` as ``cut`` divides it."""
    if rest is None:
        stored.copy_(value)
    else:
        for part, new in zip((stored, rest), cut(value), strict=True):
            part.copy_(new)
