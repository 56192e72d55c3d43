"""Whether a DataLoader gives each sample of its dataset once, as an exact gradient needs.

Only loaders that are known to do so pass: torch's own samplers, of exactly these types, and indices that can be read.
"""

from collections.abc import Sequence, Sized
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from megatron_lion.config import LionError


def check_gives_each_sample_once(loader: "DataLoader[Any]", *, is_shared: bool) -> bool:
    """Raise LionError unless ``loader`` is known to give each sample once. Returns whether its batches differ in size.

    Args:
        is_shared: other ranks give the other samples. Their batches may have other sizes.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise _unknown(loader)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise LionError(
            f"exact=True needs each sample once, but {type(dataset).__name__} has no length that says how many there "
            "are: use a dataset with __getitem__ and __len__, or exact=False"
        )
    # A loader with batch_size=None passes each index of its sampler to the dataset, or each list of indices.
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    indices, differ = _indices_of_batches(sampler, len(dataset))
    _check_indices(indices, len(dataset), is_shared=is_shared)
    return differ or is_shared


def _indices_of_batches(sampler: Any, samples: int) -> tuple[Sequence[Any], bool]:
    """All indices that ``sampler`` gives, and whether its batches differ in size."""
    if type(sampler) is BatchSampler:
        indices = _indices(sampler.sampler)
        rest = len(indices) % sampler.batch_size
        if rest and sampler.drop_last:
            raise LionError(
                f"exact=True needs all {samples} samples, but the loader drops its last batch: drop_last=False"
            )
        return indices, 0 < rest < len(indices)
    if type(sampler) in (list, tuple) and all(type(batch) in (list, tuple, range) for batch in sampler):
        return [index for batch in sampler for index in batch], len({len(batch) for batch in sampler}) > 1
    return _indices(sampler), False


def _indices(sampler: Any) -> Sequence[Any]:
    """The indices that ``sampler`` gives, in any order. Raises LionError for a type that is not known here."""
    if type(sampler) in (list, tuple, range):
        return sampler
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    if type(sampler) is SubsetRandomSampler:
        return list(map(int, sampler.indices))
    if type(sampler) is RandomSampler:
        source = len(sampler.data_source)
        if sampler.replacement:
            raise LionError(
                "exact=True needs each sample once, but the loader draws with replacement: replacement=False"
            )
        if sampler.num_samples != source:
            raise LionError(
                f"exact=True needs each sample once, but RandomSampler draws {sampler.num_samples} of {source}: leave "
                "num_samples out"
            )
        return range(source)
    if type(sampler) is DistributedSampler:
        if sampler.total_size != len(sampler.dataset):  # type: ignore[arg-type]
            raise LionError(
                f"exact=True needs each sample once, but DistributedSampler repeats samples, or drops some, to share "
                f"{len(sampler.dataset)} equally among {sampler.num_replicas} ranks: pass lists of indices as "  # type: ignore[arg-type]
                "batch_sampler"
            )
        return list(sampler)
    raise _unknown(sampler)


def _check_indices(indices: Sequence[Any], samples: int, *, is_shared: bool) -> None:
    if indices == range(samples):
        return
    distinct = set(indices)
    if len(distinct) < len(indices):
        raise LionError("exact=True needs each sample once, but the loader draws some samples twice: draw each once")
    if len(indices) != samples and not is_shared:
        raise LionError(
            f"exact=True needs all {samples} samples, but the loader's sampler gives {len(indices)}: use one that "
            "gives each once, or exact=False"
        )
    if not distinct <= set(range(samples)):
        raise LionError(
            f"exact=True needs all {samples} samples, but the loader's sampler has other indices than 0 to "
            f"{samples - 1}: use these"
        )


def _unknown(found: object) -> LionError:
    return LionError(
        f"exact=True needs each sample once, and does not know whether {type(found).__name__} gives that: use torch's "
        "DataLoader with SequentialSampler, RandomSampler, BatchSampler, or lists of indices. If it does, pass a list "
        "of its batches"
    )
