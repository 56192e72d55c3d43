"""The batches of a round over the whole split: each sample counts once and alike, in every layout."""

import itertools

import numpy
import pytest

from megatron_lion.config import LionError
from megatron_lion.integration.reporting.norm_ratio import round_data

MICRO_BATCHES = 3  # of a rank in a global batch


def weights(samples: int, micro_batch_size: int, replicas: int) -> numpy.ndarray:
    """How much each sample weighs in the round's mean, as Megatron's schedule and the round compute it.

    The schedule's loss of a batch is the mean over micro-batches and ranks of the micro-batch's mean loss.
    """
    parts = MICRO_BATCHES * replicas
    total, weight = numpy.zeros(samples), 0.0
    for part in round_data.whole_split(samples, parts * micro_batch_size, parts, micro_batch_size):
        iterators = [
            iter(
                round_data.micro_batches(
                    part.filled_up(),
                    micro_batch_size=part.micro_batch_size,
                    data_parallel_rank=rank,
                    data_parallel_size=replicas,
                )
            )
            for rank in range(replicas)
        ]
        for number in part:
            real = part.samples_in(number)
            batch = numpy.zeros(samples)
            for rank, iterator in enumerate(iterators):
                whole = [1.0] * MICRO_BATCHES
                factors = part.factors(number, rank, replicas) if real < part.size else whole
                for micro_batch, factor in zip(itertools.islice(iterator, MICRO_BATCHES), factors, strict=True):
                    for index in micro_batch:
                        batch[index] += factor / len(micro_batch) / parts
            assert batch.sum() == pytest.approx(1.0)
            total += real * batch
            weight += real
        assert all(next(iterator, None) is None for iterator in iterators)
    assert weight == samples
    return total / weight


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_each_sample_of_the_split_weighs_the_same(micro_batch_size: int, replicas: int) -> None:
    for samples in (1, 2, 7, 29, 30, 31, 60, 61, 113):
        expected = numpy.full(samples, 1.0 / samples)
        numpy.testing.assert_allclose(weights(samples, micro_batch_size, replicas), expected, rtol=1e-12)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(LionError, match="no sample of --seq-length tokens"):
        round_data.whole_split(0, 8, 4, 2)
