"""Five trits in a byte."""

import itertools

import torch

from megatron_lion.exchange.trits import GROUP, pack_trits, packed_bytes, unpack_trits


def test_all_243_bytes_are_five_trits_and_no_two_the_same():
    combinations = list(itertools.product((-1, 0, 1), repeat=5))
    trits = torch.zeros(4, 5, 64, dtype=torch.int8)
    for number, five in enumerate(combinations):
        trits[number // 64, :, number % 64] = torch.tensor(five)
    packed = pack_trits(trits.flatten())
    expected = [sum(3**k * (trit + 1) for k, trit in enumerate(five)) for five in combinations]
    assert packed[:243].tolist() == expected and sorted(expected) == list(range(243))
    assert torch.equal(unpack_trits(packed, trits.numel()), trits.flatten())


def test_every_length_up_to_1000_comes_back():
    trits = torch.randint(-1, 2, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for length in range(1001):
        packed = pack_trits(trits[:length])
        assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(length) == -(-length // GROUP) * 64
        assert torch.equal(unpack_trits(packed, length), trits[:length])
        assert not unpack_trits(packed, len(packed) * 5)[length:].any()
