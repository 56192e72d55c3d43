"""Kernels with the faults that the self-check must find, around an intact one: ``intact`` is set by the tests."""

import os
import signal

import torch

from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.precision import dequantize, quantize

intact = lion_update_foreach_


def writes_out_of_bounds(tensors, scalars, telemetry=None):
    """One element after each tensor that does not fill its last program."""
    intact(tensors, scalars, telemetry)
    for momentum in tensors.exp_avgs:
        if momentum.numel() % 1024:
            torch.as_strided(momentum, (1,), (1,), momentum.storage_offset() + momentum.numel()).add_(1)


def rounds_toward_zero(tensors, scalars, telemetry=None):
    """bf16 copies are cut off instead of rounded."""
    intact(tensors, scalars, telemetry)
    for copy, master in zip(tensors.model_copies, tensors.masters, strict=True):
        copy.copy_((master.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


def skips_the_tail(tensors, scalars, telemetry=None):
    """The elements after the last whole program keep their parameters."""
    before = [master.clone() for master in tensors.masters]
    intact(tensors, scalars, telemetry)
    for master, old in zip(tensors.masters, before, strict=True):
        whole = master.numel() // 1024 * 1024
        master[whole:].copy_(old[whole:])


def uses_a_stale_scale(tensors, scalars, telemetry=None):
    """Codes for the scale of the step before, in blocks after the first 8: what a race between warps would leave."""
    before = [scales.clone() for scales in tensors.scales]
    intact(tensors, scalars, telemetry)
    for codes, scales, old, layout in zip(tensors.exp_avgs, tensors.scales, before, tensors.blocks, strict=True):
        values = dequantize(codes, scales, layout)
        factor = torch.where(old[8:] > 0, scales[8:].float() / old[8:].float(), 1.0).repeat_interleave(32)
        late = values[256 : 256 + len(factor)]
        late.mul_(factor[: len(late)])
        codes[256:].copy_(quantize(values, layout)[0][256:])


def miscounts(tensors, scalars, telemetry=None):
    """Telemetry with one zero too many."""
    intact(tensors, scalars, telemetry)
    if telemetry is not None:
        telemetry.zeros += 1


def changes_gradients(tensors, scalars, telemetry=None):
    """Gradients are scratch space."""
    intact(tensors, scalars, telemetry)
    tensors.grads[-1].neg_()


def ignores_skip(tensors, scalars, telemetry=None):
    """A step that is to be skipped is made."""
    intact(tensors, scalars._replace(skip=None), telemetry)


def writes_wrong_digits(tensors, scalars, telemetry=None):
    """Residuals of the other sign."""
    intact(tensors, scalars, telemetry)
    for digits in tensors.digits or ():
        digits.copy_(torch.where(digits < 128, digits & 3 | (-(digits >> 2) & 3) << 2, digits))


def crashes(tensors, scalars, telemetry=None):
    """What an illegal address may do."""
    os.kill(os.getpid(), signal.SIGSEGV)
