"""Per-step statistics of the Lion update, accumulated inside the kernel when enabled."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Telemetry:
    """Sums over the elements of one or more steps. Kernels add to it; ``merge`` adds those of another rank or group.

    Sums are float64, counts are exact. g is the gradient after ``grad_scale``, c the direction, m the momentum before
    the step, theta the parameter after it. A sum that includes a NaN is NaN; ``linf_param`` is inf instead, because a
    maximum over ranks may drop a NaN. The fused kernel gives the same bits for any number of threads. Kernels sum in
    different orders, so their results agree only up to the rounding of float64. Issues no collective.
    """

    elements: int = 0
    l1: float = 0.0
    """sum |g|"""
    l2_squared: float = 0.0
    """sum g^2"""
    inner: float = 0.0
    """sum sign(c) g"""
    zeros: int = 0
    """elements with sign(c) = 0, NaN included; only weight decay moved them"""
    flipped: int = 0
    """elements with sign(c) = -sign(m), neither 0: this gradient reversed the direction of the momentum"""
    linf_param: float = 0.0
    """max |theta|"""

    @property
    def l2(self) -> float:
        """The norm of g."""
        return math.sqrt(self.l2_squared)

    @property
    def agreement(self) -> float:
        """sum sign(c) g / sum |g|, in [-1, 1]. 1 if all elements move against their gradients; NaN without gradient."""
        return self.inner / self.l1 if self.l1 else math.nan

    @property
    def zero_share(self) -> float:
        """The share of elements with sign(c) = 0; NaN without elements."""
        return self.zeros / self.elements if self.elements else math.nan

    @property
    def flipped_share(self) -> float:
        """The share of elements with a direction opposite to the momentum; NaN without elements."""
        return self.flipped / self.elements if self.elements else math.nan

    def merge(self, other: "Telemetry") -> None:
        """Add ``other``'s sums to these."""
        self.elements += other.elements
        self.l1 += other.l1
        self.l2_squared += other.l2_squared
        self.inner += other.inner
        self.zeros += other.zeros
        self.flipped += other.flipped
        self.linf_param = max(self.linf_param, math.inf if math.isnan(other.linf_param) else other.linf_param)

    def add_direction(self, sign: Tensor, grad: Tensor, exp_avg: Tensor) -> None:
        """Add one parameter's sign(c), scaled gradient and momentum before the step. They are not modified."""
        g, signs = grad.double(), sign.double()
        self.merge(
            Telemetry(
                elements=sign.numel(),
                l1=float(g.abs().sum()),
                l2_squared=float(g.square().sum()),
                inner=float((signs * g).sum()),
                zeros=int((sign == 0).sum()),
                flipped=int((signs * torch.sign(exp_avg.double()) < 0).sum()),
            )
        )

    def add_param(self, param: Tensor) -> None:
        """Include one parameter's new values in the maximum."""
        if param.numel():
            self.merge(Telemetry(linf_param=float(param.abs().max())))
