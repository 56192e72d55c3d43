"""What the receivers of a parameter must be told about a step of Lion: two trits, and rarely 16 bits.

The owner of an element has its fp32 master theta. It steps, in fp32 with every operation rounded::

    theta' = theta - (s + theta wd) lr,    s = sign(c) in {-1, 0, 1}
    p'     = cast(theta')

The receivers have the old parameter p = cast(theta), lr and wd. They lack s and the bits of theta that cast drops.

- fp32 parameters drop none: p is theta. Given s, the receivers compute p' itself.
- 16-bit parameters: given s, the receivers compute the guess g = cast(p - (s + p wd) lr). The owner computes the same
  guess and also sends the residual r = code(p') - code(g) modulo 2^16, where code(x) is the integer with the bits of x.
  Codes of neighboring numbers differ by 1, and theta is within half a unit of p, so r is -1, 0 or 1 unless the step
  crosses into a finer binade or changes the sign. Such elements are exceptions: p' itself is sent.

``cast`` is the rounding of the run: to nearest even for fp32 masters that are copied to bf16 or fp16 parameters, half
away from zero where an int16 remainder holds the other half of the master
(:func:`megatron_lion.precision.split_master`).

A digit is one byte for one element: s in bits 0 and 1, r in bits 2 and 3, both in two's complement, and bit 7 for an
exception, whose s and r are 0.
"""

import torch
from torch import Tensor

from megatron_lion.precision import split_master

EXCEPTION = 0x80
# What parameters may be: their dtype, and whether they are rounded half away from zero. Kernels know a format by its
# number here.
FORMATS = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False))
CODES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def step(theta: Tensor, sign: Tensor, lr: float, weight_decay: float) -> Tensor:
    """theta - (s + theta wd) lr in fp32, with the roundings of :func:`megatron_lion.update.lion_step`."""
    theta = theta.float()
    return theta - (sign.float() + theta * weight_decay) * lr


def cast_code(values: Tensor, dtype: torch.dtype, *, half_away: bool) -> Tensor:
    """The codes, int16, of fp32 ``values`` rounded to ``dtype``, bf16 or fp16. Every NaN gets the same code.

    Rounds to nearest even, or bf16 half away from zero with ``half_away``.
    """
    if half_away:
        return split_master(values)[0].view(torch.int16)
    return values.to(dtype).view(torch.int16).masked_fill(values.isnan(), QUIET_NAN[dtype])


def sign_digits(
    old: Tensor, new: Tensor, sign: Tensor, *, lr: float, weight_decay: float, half_away: bool = False
) -> Tensor:
    """The digits, uint8, of one step of elements that share ``lr`` and ``weight_decay``.

    Args:
        old: the parameters before the step, any shape, fp32, bf16 or fp16.
        new: the parameters after the step, of the same shape and dtype.
        sign: s of the same shape, of any dtype.
        lr: the learning rate of the step, rounded to fp32 where it is used, as is ``weight_decay``.
        weight_decay: the weight decay of the step.
        half_away: whether bf16 parameters are rounded half away from zero.
    """
    signs = sign.to(torch.int8) & 3
    if old.dtype == torch.float32:
        return signs.view(torch.uint8)
    guess = cast_code(step(old, sign, lr, weight_decay), old.dtype, half_away=half_away)
    residual = new.contiguous().view(torch.int16) - guess  # wraps modulo 2^16
    digits = signs | (residual.to(torch.int8) & 3) << 2
    return torch.where((residual >= -1) & (residual <= 1), digits.view(torch.uint8), EXCEPTION)


def trits_of(digits: Tensor) -> tuple[Tensor, Tensor]:
    """The signs and residuals, int8, in ``digits``."""
    two_bits = (digits & 3, digits >> 2 & 3)
    signs, residuals = ((bits.to(torch.int8) + 1 & 3) - 1 for bits in two_bits)
    return signs, residuals


def count_exceptions(digits: Tensor) -> Tensor:
    """The number of elements that ``digits`` cannot express: int64 without dimensions, on their device."""
    return torch.count_nonzero(digits & EXCEPTION)
