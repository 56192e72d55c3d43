"""The batches of a round, drawn from the training split by a separate iterator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat, exit_signal


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Global batches of one size, one after the other; the last may have fewer samples than the others."""

    indices: numpy.ndarray
    """of the samples in the dataset"""
    size: int
    """samples in a global batch"""
    micro_batch_size: int

    @property
    def samples(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the batches."""
        return iter(range(-(-self.samples // self.size)))

    def samples_in(self, number: int) -> int:
        """Samples of a batch, without those that fill it up."""
        return min(self.size, self.samples - number * self.size)

    def factors(self, number: int, rank: int, world: int) -> list[float]:
        """What the loss of each of a data-parallel rank's micro-batches in a batch is multiplied by.

        Micro-batches are of one sample. A sample that fills the batch up gets 0. The others get what makes the
        schedule's mean over all of them the mean over the real ones.
        """
        real = self.samples_in(number)
        return [self.size / real if place < real else 0.0 for place in range(rank, self.size, world)]

    def filled_up(self) -> numpy.ndarray:
        """The indices, with the first repeated until the last batch is full."""
        missing = -self.samples % self.size
        return numpy.concatenate((self.indices, numpy.repeat(self.indices[:1], missing)))


def whole_split(samples: int, size: int, smallest: int, micro_batch_size: int) -> list[Batches]:
    """All samples in order: global batches as in training, then the rest in micro-batches of one sample.

    Args:
        samples: of the whole dataset.
        size: samples in a global batch.
        smallest: samples in a global batch of as many micro-batches of one sample.
        micro_batch_size: training's.

    Raises LionError for no sample.
    """
    if samples < 1:
        raise LionError("--norm-ratio-batches all: the training split has no sample of --seq-length tokens; add text")
    full = samples // size * size
    parts = [
        Batches(indices=numpy.arange(full), size=size, micro_batch_size=micro_batch_size),
        Batches(indices=numpy.arange(full, samples), size=smallest, micro_batch_size=1),
    ]
    return [part for part in parts if part.samples]


def draw_indices(samples: int, *, seed: int, iteration: int, count: int) -> numpy.ndarray:
    """``count`` independent uniform draws from ``range(samples)``, the same for the same seed and iteration.

    With replacement, so that batches are independent and identically distributed, as Assumption 3 has them and the
    noise estimate's formulas need them.
    """
    return numpy.random.default_rng([seed, iteration]).integers(samples, size=count)


def one_epoch(provider: Callable[[tuple[None, None, None]], Sequence[Any]]) -> Any:
    """The training split's samples, each once, from the loop's dataset provider. Issues its collectives.

    Megatron builds one epoch where it is not told a number of samples. Raises LionError where the provider cannot.
    """
    try:
        with compat.one_epoch_of_sentences():
            return provider((None, None, None))[0]
    except (AssertionError, TypeError, ValueError) as error:
        raise LionError(
            f"--norm-ratio-batches all needs a dataset of one epoch, and the dataset provider builds none: {error}. "
            "Use data paths without weights, or set a number of batches"
        ) from error


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


def iterators(
    datasets: Sequence[Any], like: Any, indices: Sequence[Sequence[int]], args: Any, seed: Sequence[int]
) -> Any:
    """Iterators over ``indices``, in the form of ``like``, the training iterator: one, or one for each model chunk.

    Args:
        datasets: this rank's training dataset for each chunk; empty or None where the rank reads no data.
        like: :func:`form_of` Megatron's ``data_iterator``.
        indices: those of each micro-batch.
        args: Megatron's arguments, for the number of workers.
        seed: numbers >= 0 that seed the workers' random draws, if the dataset makes any.
    """
    if isinstance(like, list):
        chunks = list(datasets) if datasets else [None] * len(like)
        return [_iterator(dataset, indices, args, seed) for dataset in chunks]
    return _iterator(datasets[0] if datasets else None, indices, args, seed)


def _iterator(dataset: Any, indices: Sequence[Sequence[int]], args: Any, seed: Sequence[int]) -> Any:
    from megatron.core.rerun_state_machine import RerunDataIterator

    if dataset is None:
        return None
    # A loader draws its workers' seed. It must not do so from the training's generator.
    generator = torch.Generator().manual_seed(int(numpy.random.SeedSequence(seed).generate_state(1, numpy.uint64)[0]))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,  # type: ignore[arg-type]
        num_workers=args.num_workers,
        pin_memory=True,
        generator=generator,
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
