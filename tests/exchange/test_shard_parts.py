"""The parts in which a shard is sent."""

import itertools

import pytest

from megatron_lion.exchange.message import CHUNK
from megatron_lion.integration.exchange.bucket_signs import MOST_PARTS, SMALLEST_PART, parts_of


@pytest.mark.parametrize("device", SMALLEST_PART)
def test_parts_follow_each_other_in_whole_chunks(device):
    smallest = SMALLEST_PART[device]
    for numel in (1, 319, CHUNK, smallest - 1, smallest, 2 * smallest - 1, 2 * smallest, 2 * smallest + 1, 10**9 + 7):
        parts = parts_of(numel, smallest)
        assert parts[0].start == 0 and parts[-1].stop == numel
        assert all(one.stop == other.start and one.stop % CHUNK == 0 for one, other in itertools.pairwise(parts))
        assert 1 <= len(parts) <= MOST_PARTS
        assert len(parts) == (1 if numel < 2 * smallest else MOST_PARTS)
