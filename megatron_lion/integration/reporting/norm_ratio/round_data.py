"""The batches of a round, drawn from the training split by a separate iterator."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from megatron_lion.config import LionError
from megatron_lion.integration import exit_signal


def draw_indices(samples: int, *, seed: int, iteration: int, count: int) -> numpy.ndarray:
    """``count`` independent uniform draws from ``range(samples)``, the same for the same seed and iteration.

    With replacement, so that batches are independent and identically distributed, as Assumption 3 has them and the
    noise estimate's formulas need them.
    """
    return numpy.random.default_rng([seed, iteration]).integers(samples, size=count)


def micro_batches(
    indices: numpy.ndarray, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[list[int]]:
    """The samples of one data-parallel rank, from the consecutive global batches in ``indices``. Divided as by
    Megatron's own sampler, so that a global batch has the same samples in every layout.
    """
    cut = indices.reshape(-1, data_parallel_size, micro_batch_size)
    return cut[:, data_parallel_rank].tolist()


def form_of(data_iterator: Any) -> list[None] | None:
    """The form of Megatron's iterator, for :func:`iterators`: a list with an entry per model chunk, or None."""
    return [None] * len(data_iterator) if isinstance(data_iterator, list) else None


def iterators(datasets: Sequence[Any], like: Any, indices: Sequence[Sequence[int]], args: Any) -> Any:
    """Iterators over ``indices``, in the form of ``like``, the training iterator: one, or one for each model chunk.

    Args:
        datasets: this rank's training dataset for each chunk; empty or None where the rank reads no data.
        like: :func:`form_of` Megatron's ``data_iterator``.
        indices: those of each micro-batch.
        args: Megatron's arguments, for the number of workers.
    """
    if isinstance(like, list):
        chunks = list(datasets) if datasets else [None] * len(like)
        return [_iterator(dataset, indices, args) for dataset in chunks]
    return _iterator(datasets[0] if datasets else None, indices, args)


def _iterator(dataset: Any, indices: Sequence[Sequence[int]], args: Any) -> Any:
    from megatron.core.rerun_state_machine import RerunDataIterator

    if dataset is None:
        return None
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,  # type: ignore[arg-type]
        num_workers=args.num_workers,
        pin_memory=True,
        generator=torch.Generator(),  # a loader draws its workers' seed; not from the training's generator
    )
    with exit_signal.processes_live_through_it(args):
        return RerunDataIterator(iter(loader))


def check_datasets(datasets: Sequence[Any]) -> None:
    """Raise LionError for a training dataset that cannot be read at any place."""
    for dataset in datasets:
        if dataset is not None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise LionError(
                f"--norm-ratio-interval needs a training dataset with __getitem__ and __len__, from which it draws "
                f"batches; {type(dataset).__name__} lacks one of them"
            )
