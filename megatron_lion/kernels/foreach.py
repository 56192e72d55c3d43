"""Lion with torch's ``_foreach`` operations on chunks of many tensors: few launches on a GPU, for every storage."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lion.exchange.digits import sign_digits
from megatron_lion.kernels.chunks import Chunk, chunks_of
from megatron_lion.kernels.digits import refuse_skip
from megatron_lion.precision import BLOCK, BlockLayout, dequantize, join_master, quantize, split_master
from megatron_lion.step import StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import compute_dtype

# Maximum elements of a chunk, which bounds the temporary memory. On a GPU a chunk must also be large enough that its
# kernels, not their launches, take the time. On a CPU the temporaries must stay in the cache and in memory that malloc
# keeps: with 2^26 elements the system mapped them page by page in every step, which took 5 times as long.
MAX_NUMEL = 1 << 24
MAX_NUMEL_SMALL = 1 << 22  # packed state, telemetry and digits need more bytes per element
MAX_NUMEL_CPU = 1 << 18


@torch.no_grad()
def lion_update_foreach_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors of any storage; the same bits, in place.

    Temporary memory is bounded by one chunk: at most ``MAX_NUMEL`` elements (``MAX_NUMEL_SMALL`` with remainders, int8
    momentum, telemetry or digits, ``MAX_NUMEL_CPU`` on a CPU), more only for larger tensors that are not contiguous.
    Per element of a chunk it takes 12 bytes for fp32 masters and momenta, 16 to 20 if those are bf16, 26 to 30 with
    remainders or int8 momentum, up to 60 with telemetry, and up to 30 more with digits: on a GPU at most 380 MB. Issues
    no collective. Raises ValueError if there are digits and the step may be skipped on the device.
    """
    refuse_skip(tensors, scalars)
    if tensors.kind is None or scalars.skips():
        return
    numbers = scalars.on_host()
    for chunk in chunks_of(tensors, _limit(tensors.kind, telemetry, tensors.digits)):
        _update_chunk(chunk, numbers, telemetry)


def _limit(kind: StepKind, telemetry: Telemetry | None, digits: list[Tensor] | None) -> int:
    """Maximum elements of a chunk."""
    if kind.device.type == "cpu":
        return MAX_NUMEL_CPU
    return MAX_NUMEL if telemetry is None and digits is None and not kind.is_packed else MAX_NUMEL_SMALL


def _update_chunk(chunk: Chunk, numbers: tuple[float, float, float, float, float], telemetry: Telemetry | None) -> None:
    lr, beta1, beta2, weight_decay, grad_scale = numbers
    dtype = compute_dtype(chunk.masters[0])
    layout = chunk.layout or BlockLayout(0, BLOCK)  # not used without scales
    thetas, store_thetas = _values(chunk.masters, chunk.remainders, dtype, join_master, split_master)
    momenta, store_momenta = _values(
        chunk.exp_avgs,
        chunk.scales,
        dtype,
        functools.partial(dequantize, layout=layout),
        functools.partial(quantize, layout=layout),
    )
    grads = _converted(chunk.grads, dtype)
    if grad_scale != 1.0:
        grads = list(torch._foreach_mul(grads, grad_scale))
    steps = list(torch._foreach_mul(momenta, beta1))
    torch._foreach_add_(steps, torch._foreach_mul(grads, 1.0 - beta1))
    torch._foreach_sign_(steps)
    write_digits = _digits_of(chunk, steps, lr, weight_decay)
    if telemetry is not None:
        telemetry.add_direction(*map(_flat, (steps, grads, momenta)))
    torch._foreach_add_(steps, torch._foreach_mul(thetas, weight_decay))
    torch._foreach_mul_(steps, lr)
    torch._foreach_sub_(thetas, steps)
    del steps
    if telemetry is not None:
        telemetry.add_param(_flat(thetas))
    if chunk.model_copies is not None:
        torch._foreach_copy_(chunk.model_copies, thetas)
    store_thetas()
    del thetas, store_thetas
    write_digits()
    torch._foreach_mul_(momenta, beta2)
    torch._foreach_add_(momenta, torch._foreach_mul(grads, 1.0 - beta2))
    del grads
    store_momenta()


def _digits_of(chunk: Chunk, signs: list[Tensor], lr: float, weight_decay: float) -> Callable[[], None]:
    """Keep the signs and the model's parameters from before the step. Returns what writes the digits after it."""
    if (written := chunk.digits) is None:
        return lambda: None
    params = chunk.masters if chunk.model_copies is None else chunk.model_copies
    old, sign = _flat(params).clone(), _flat(signs).to(torch.int8)

    def write() -> None:
        half_away = chunk.remainders is not None
        digits = sign_digits(old, _flat(params), sign, lr=lr, weight_decay=weight_decay, half_away=half_away)
        torch._foreach_copy_(written, _shaped(digits, written))

    return write


def _values(
    stored: list[Tensor],
    rest: list[Tensor] | None,
    dtype: torch.dtype,
    join: Callable[[Tensor, Tensor], Tensor],
    split: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[list[Tensor], Callable[[], None]]:
    """The values of ``stored`` in ``dtype``, to be changed in place, and a function that stores them afterwards.

    Without ``rest`` they are ``stored`` themselves where the dtype is the same. With it, ``join`` makes the values of
    all tensors, flattened, and ``split`` is its inverse.
    """
    if rest is None:
        values = _converted(stored, dtype)
        return values, lambda: None if values is stored else torch._foreach_copy_(stored, values)
    flat = join(_flat(stored), _flat(rest))

    def store() -> None:
        for tensors, new in zip((stored, rest), split(flat), strict=True):
            torch._foreach_copy_(tensors, _shaped(new, tensors))

    return _shaped(flat, stored), store


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``tensors`` themselves if they have ``dtype``, else new ones."""
    if tensors[0].dtype == dtype:
        return tensors
    values = _shaped(tensors[0].new_empty(sum(map(Tensor.numel, tensors)), dtype=dtype), tensors)
    torch._foreach_copy_(values, tensors)
    return values


def _flat(tensors: list[Tensor]) -> Tensor:
    """All elements of ``tensors``, one tensor after another; a view if possible."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _shaped(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of ``flat`` with the shapes of ``tensors``."""
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
