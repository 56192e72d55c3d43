"""The norm ratio of any plain PyTorch model, measured in one call and leaving no trace."""

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from megatron_lion.config import LionError, check_non_negative
from megatron_lion.stats.convergence import PREFIXES
from megatron_lion.stats.record import GradientRecord
from megatron_lion.stats.round import BatchShare, Counted, GradientRound
from megatron_lion.stats.whole_split import check_gives_each_sample_once

Loss = Tensor | tuple[Tensor, float]
WeightDecay = float | Sequence[Mapping[str, Any]]


def full_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Loss],
    *,
    weight_decay: WeightDecay = 0.0,
    prefixes: Iterable[int] = PREFIXES,
    share: BatchShare | None = None,
    exact: bool = False,
) -> GradientRecord:
    """Measure loss, gradient norms, their ratio and noise over ``batches``, with the parameters held fixed.

    The gradient is the mean over batches, each of equal weight, or of the weight that ``loss_fn`` returns with the
    loss: with a mean loss per sample and weight = samples in the batch, a smaller last batch counts as it should. It is
    accumulated outside ``.grad``, in float32 (:class:`stats.MeanGradient` says how that is right to 1e-6). A tied
    parameter counts once, with its whole gradient; frozen ones are left out; one that the loss does not reach counts
    as zeros.

    The model runs in the mode that it is in: call ``eval()`` first to measure without dropout. Afterwards ``.grad`` of
    every parameter, modes, buffers (BatchNorm's statistics), the random states of torch, CUDA, Python and numpy, and
    those of a loader's own generator, are what they were, also after an error. An iterator that is passed is used up.

    Args:
        model: any module on one process; not one that is sharded or wrapped for data-parallel training (the module
            inside, with ``share``).
        batches: anything to iterate over: a DataLoader, a list.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss, a scalar with a graph, or ``(loss, weight)``. It
            neither calls ``backward()`` nor changes parameters.
        weight_decay: lambda for the KKT residual, one for all, or ``optimizer.param_groups`` for each group's own.
        prefixes: after how many batches the ratio is also recorded.
        share: for data-parallel ranks with equal parameters: ``batches`` are this rank's own, and the record, on every
            rank, is that of all of them. It then issues collectives, and every rank must call it.
        exact: ``batches`` are a whole split, each sample once, and the loss draws nothing at random (no dropout): the
            gradient is that of the split. The record then says so. A DataLoader is checked: it must be known to give
            each sample once, by torch's own samplers or lists of indices. If its batches differ in size, or with
            ``share``, ``loss_fn`` must return weights. Anything else, such as a list of batches, is not checked.

    Raises:
        LionError: for no batches, a loss that is not a scalar, is not finite or has no gradient, a weight that is not
            positive, a parameter in no group, two parameters in one memory, or a ``loss_fn`` that changed one. With
            ``exact``, for a loader that is not known to give each sample once with equal weight.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> record = full_gradient(layer, [torch.ones(4, 2)], lambda model, batch: model(batch).mean())
        >>> record.d, record.batches, round(record.ratio, 3)
        (3, 1, 1.732)
    """
    named = _counted_parameters(model)
    params = list(named.values())
    decays = _decays(named, weight_decay)
    counted = [Counted(name=n, value=p, weight_decay=d) for (n, p), d in zip(named.items(), decays, strict=True)]
    needs_weight = False
    if exact and isinstance(batches, DataLoader):
        needs_weight = check_gives_each_sample_once(batches, is_shared=share is not None)
    measured = GradientRound(counted, prefixes=prefixes, share=share, exact=exact)
    versions = [param._version for param in params]
    with _undisturbed(model, batches), torch.enable_grad():
        for index, batch in enumerate(batches):
            loss, weight = _checked_loss(loss_fn(model, batch), index, needs_weight=needs_weight)
            measured.add(torch.autograd.grad(loss, params, allow_unused=True), loss=loss.detach(), weight=weight)
            del loss  # or two graphs would be alive at a time
    for (name, param), version in zip(named.items(), versions, strict=True):
        if param._version != version:
            raise LionError(f"loss_fn changed parameter {name}; it must only compute the loss")
    if measured.mean.batches == 0 and not (share and share.batches):
        raise LionError("full_gradient got no batches; an iterator can be used only once")
    return measured.finish()


def _counted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, each once, by the first of its names."""
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not named:
        raise LionError("the model has no parameter with requires_grad=True, so there is no gradient to measure")
    at: dict[tuple[torch.device, int], str] = {}
    for name, param in named.items():
        # Tied by memory alone, each of the two would get a part of the gradient, and be counted.
        if param.numel() and (other := at.setdefault((param.device, param.data_ptr()), name)) != name:
            raise LionError(
                f"{other} and {name} are two parameters in one memory: tie them by giving both modules one Parameter"
            )
    return named


def _decays(named: Mapping[str, nn.Parameter], weight_decay: WeightDecay) -> list[float]:
    """lambda of each parameter, in order."""
    if isinstance(weight_decay, int | float):
        return [check_non_negative("weight_decay", weight_decay)] * len(named)
    by_param = {
        param: check_non_negative("weight_decay", group.get("weight_decay", 0.0))
        for group in weight_decay
        for param in group["params"]
    }
    missing = [name for name, param in named.items() if param not in by_param]
    if missing:
        raise LionError(f"no group of weight_decay holds {', '.join(missing)}; give one number, or freeze these")
    return [by_param[param] for param in named.values()]


def _checked_loss(returned: Loss, index: int, *, needs_weight: bool) -> tuple[Tensor, float]:
    """The loss and the batch's weight, or LionError naming the batch."""
    if needs_weight and not isinstance(returned, tuple):
        raise LionError(
            "the loader's batches differ in size, because the last batch is smaller or another rank's may be, so the "
            "mean over batches is not the mean over samples: let loss_fn return (loss, samples in the batch)"
        )
    loss, weight = returned if isinstance(returned, tuple) else (returned, 1.0)
    where = f"loss_fn of batch {index} (counted from 0)"
    if not torch.is_tensor(loss) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise LionError(f"{where} must return one number in a tensor, got {got}; take the mean over the batch")
    if not math.isfinite(float(loss.detach())):
        raise LionError(f"{where} returned {float(loss.detach())}; a mean over it would say nothing")
    if not loss.requires_grad:
        raise LionError(f"{where} returned a loss without a graph: do not detach it, nor compute it under no_grad")
    weight = float(weight)
    if not (math.isfinite(weight) and weight > 0.0):
        raise LionError(f"{where} returned the weight {weight}; it must be finite and > 0")
    return loss.reshape(()), weight


@contextmanager
def _undisturbed(model: nn.Module, batches: object) -> Iterator[None]:
    """On leaving, put back modes, buffers and random states; gradients are not touched in the first place."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    # The generator of a DataLoader shuffles the training that follows, too.
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, getattr(batches, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    generators = [(one, one.get_state()) for one in found if isinstance(one, torch.Generator)]
    numpy = sys.modules.get("numpy")  # not imported for this: who never imported it has no state in it
    numpy_state = numpy.random.get_state() if numpy else None
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)
        for generator, state in generators:
            generator.set_state(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
