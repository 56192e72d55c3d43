"""Lion on lists of tensors with torch's ``_foreach`` operations: few launches on a GPU, few Python calls on a CPU."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_lion.precision import Place
from megatron_lion.telemetry import Telemetry

# Elements in one call of a foreach operation. On a GPU long lists make few launches, and the limit is there because
# temporaries for all parameters would double the peak memory of a step. On a CPU the temporaries must stay in the cache
# and be memory that malloc keeps: 2^26 elements came from the system page by page in every step, 5 times slower.
MAX_NUMEL_PER_CALL = 1 << 26
MAX_NUMEL_PER_CALL_CPU = 1 << 18

Row = tuple[Tensor, ...]


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
    telemetry: Telemetry | None = None,
) -> None:
    """:func:`megatron_lion.update.lion_update_` for tensors that :func:`foreach_supports`; the same bits, in place.

    Needs two temporaries, three where ``grad_scale`` is not 1, of at most ``MAX_NUMEL_PER_CALL`` elements, on a CPU
    ``MAX_NUMEL_PER_CALL_CPU``; more where a larger tensor is not contiguous.
    """
    if remainders is not None or scales is not None:
        raise ValueError("this kernel takes no packed state: use the reference")
    roles = [params, grads, exp_avgs] if copies is None else [params, grads, exp_avgs, copies]
    for p, g, m, *targets in _chunks(list(zip(*roles, strict=True))):
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
        for target in targets:
            torch._foreach_copy_(target, p)


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    """Consecutive ``rows``, role by role, to work on at once: at most the limit's elements, or one row."""
    chunk: list[Row] = []
    numel = 0
    for row in itertools.chain.from_iterable(map(_pieces, rows)):
        if chunk and numel + row[0].numel() > _limit(row[0]):
            yield list(zip(*chunk, strict=True))
            chunk, numel = [], 0
        chunk.append(row)
        numel += row[0].numel()
    if chunk:
        yield list(zip(*chunk, strict=True))


def _pieces(row: Row) -> Iterable[Row]:
    """``row`` cut into flat pieces of at most the limit's elements, where its tensors can be."""
    limit = _limit(row[0])
    if row[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in row):
        return [row]
    return zip(*(torch.split(tensor.view(-1), limit) for tensor in row), strict=True)


def _limit(tensor: Tensor) -> int:
    return MAX_NUMEL_PER_CALL_CPU if tensor.device.type == "cpu" else MAX_NUMEL_PER_CALL
