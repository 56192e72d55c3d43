"""Lion on lists of tensors with torch's ``_foreach`` operations: few launches on a GPU, few Python calls on a CPU."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_lion.step import StepKind, StepScalars, StepTensors
from megatron_lion.telemetry import Telemetry

# Maximum elements per foreach call. On a GPU long lists mean few launches; the limit is there because temporaries for
# all parameters would double the peak memory of a step. On a CPU the temporaries must stay in the cache and in memory
# that malloc keeps: with 2^26 elements the system mapped them page by page in every step, which took 5 times as long.
MAX_NUMEL_PER_CALL = 1 << 26
MAX_NUMEL_PER_CALL_CPU = 1 << 18


def foreach_supports(kind: StepKind) -> bool:
    """Whether masters, gradients and momenta have one dtype that is also that of the arithmetic (fp32 or fp64)."""
    dtypes = {kind.masters, kind.grads, kind.exp_avgs}
    return not kind.is_packed and len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}


@torch.no_grad()
def lion_update_foreach_(tensors: StepTensors, scalars: StepScalars, telemetry: Telemetry | None = None) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`foreach_supports`; the same bits, in place.

    Needs two temporaries, three if ``grad_scale`` is not 1, of at most ``MAX_NUMEL_PER_CALL`` elements, on a CPU
    ``MAX_NUMEL_PER_CALL_CPU``; more for larger tensors that are not contiguous. Issues no collective. Raises ValueError
    for unsupported tensors.
    """
    if tensors.kind is None or scalars.skips():
        return
    if not foreach_supports(tensors.kind):
        raise ValueError(f"the foreach kernel does not support {tensors.kind}; use kernels.choose")
    lr, beta1, beta2, weight_decay, grad_scale = scalars.on_host()
    for p, g, m, *copies in _chunks(list(zip(*tensors.roles().values(), strict=True))):
        if grad_scale != 1.0:
            g = torch._foreach_mul(g, grad_scale)
        step = torch._foreach_mul(m, beta1)
        term = torch._foreach_mul(g, 1.0 - beta1)
        torch._foreach_add_(step, term)
        torch._foreach_sign_(step)
        del term
        if telemetry is not None:
            for sign, grad, exp_avg in zip(step, g, m, strict=True):
                telemetry.add_direction(sign, grad, exp_avg)
        term = torch._foreach_mul(p, weight_decay)
        torch._foreach_add_(step, term)
        torch._foreach_mul_(step, lr)
        torch._foreach_sub_(p, step)
        del step, term
        if telemetry is not None:
            for param in p:
                telemetry.add_param(param)
        term = torch._foreach_mul(g, 1.0 - beta2)
        torch._foreach_mul_(m, beta2)
        torch._foreach_add_(m, term)
        for model_copies in copies:
            torch._foreach_copy_(model_copies, p)


def _chunks(entries: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Split ``entries`` (one per parameter) into lists per role, of at most the limit's elements or one entry."""
    chunk: list[tuple[Tensor, ...]] = []
    numel = 0
    for entry in itertools.chain.from_iterable(map(_pieces, entries)):
        if chunk and numel + entry[0].numel() > _limit(entry[0]):
            yield list(zip(*chunk, strict=True))
            chunk, numel = [], 0
        chunk.append(entry)
        numel += entry[0].numel()
    if chunk:
        yield list(zip(*chunk, strict=True))


def _pieces(entry: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
    """``entry`` split into flat pieces of at most the limit's elements, if its tensors are contiguous."""
    limit = _limit(entry[0])
    if entry[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in entry):
        return [entry]
    return zip(*(torch.split(tensor.view(-1), limit) for tensor in entry), strict=True)


def _limit(tensor: Tensor) -> int:
    return MAX_NUMEL_PER_CALL_CPU if tensor.device.type == "cpu" else MAX_NUMEL_PER_CALL
