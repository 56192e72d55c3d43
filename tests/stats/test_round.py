"""A round whose elements lie on several ranks gives the record of one process, with one all-reduce."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.stats import BatchShare, Counted, GradientRecord, GradientRound

RANKS = 3
TAGS = [("kinds", "mlp"), ("kinds", "norm"), ("layers", "1"), ("layers", "2"), ("layers", "3")]
SHAPES = {"mlp.1": 5000, "mlp.2": 77, "norm.2": 30}
WEIGHTS = (1.0, 3.0, 2.0, 1.0)


def counted(name: str, value: Tensor, padding: int = 0) -> Counted:
    kind, layer = name.split(".")
    decay = 0.1 if kind == "mlp" else 0.0
    tags = (("kinds", kind), ("layers", layer))
    return Counted(name=name, value=value, weight_decay=decay, padding=padding, tags=tags)


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SHAPES.items()}


def gradients(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1 + batch)
    return {name: 0.3 + torch.randn(size, generator=generator) for name, size in SHAPES.items()}


def cut(tensor: Tensor, rank: int) -> Tensor:
    """Uneven shards, one of them empty for the smaller tensors."""
    bounds = [0, 0, len(tensor) // 3, len(tensor)] if len(tensor) < 100 else [0, 1234, 4900, len(tensor)]
    return tensor[bounds[rank] : bounds[rank + 1]]


def measure(rank: int | None) -> GradientRound:
    """The round of one of three ranks, or of one process. Each rank gives a third of the loss."""
    part = (lambda tensor: tensor) if rank is None else (lambda tensor: cut(tensor, rank))
    mine = [counted(name, part(value), padding=rank or 0) for name, value in values().items()]
    measured = GradientRound(mine, tags=TAGS, prefixes=(1, 2))
    for batch, weight in enumerate(WEIGHTS):
        loss = torch.tensor(2.0 + batch) / (1 if rank is None else RANKS)
        measured.add([part(grad) for grad in gradients(batch).values()], loss=loss, weight=weight)
    return measured


def numbers(record: GradientRecord) -> dict[str, float]:
    """Every number in a record but the seconds, by its path."""
    found: dict[str, float] = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{path}/{key}", entry)
        elif value is not None and not path.endswith(("seconds", "d_padding")):
            found[path] = float(value)  # type: ignore[arg-type]

    walk("", asdict(record))
    return found


def test_the_record_of_three_ranks_is_that_of_one_process() -> None:
    whole = measure(None).finish(expected=sum(SHAPES.values()))
    rounds = [measure(rank) for rank in range(RANKS)]
    vectors: list[Tensor] = []
    for rank, one in enumerate(rounds):
        one.finish(lambda vector: vectors.append(vector.clone()), rank=rank, world=RANKS)
    assert len(vectors) == RANKS, "one all-reduce each"
    for rank, one in enumerate(rounds):
        record = one.finish(lambda vector: vector.copy_(sum(vectors)), rank=rank, world=RANKS)
        assert numbers(record) == pytest.approx(numbers(whole), rel=1e-6)
        assert record.d_padding == 3 * (0 + 1 + 2)
    assert whole.loss == pytest.approx((2 + 3 * 3 + 2 * 4 + 5) / 7)
    assert list(whole.prefixes) == [1, 2]


class Together:
    """An all-reduce among threads, one for each rank; a collective that one of them never joins is a BrokenBarrier."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.given: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> None:
        self.barrier.wait()
        self.given.append(tensor.clone())
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        if self.barrier.wait() == 0:
            self.given.clear()
        self.barrier.wait()
        tensor.copy_(total)


def shared_out(batches: int, share: BatchShare | None = None, own: range | None = None) -> GradientRecord:
    """The record on one of the ranks that share out the batches, or of one process."""
    mine = [counted(name, value) for name, value in values().items()]
    measured = GradientRound(mine, tags=TAGS, prefixes=(1, 2, 3, 6), share=share)
    for batch in range(batches) if own is None else own:
        measured.add(list(gradients(batch).values()), loss=torch.tensor(2.0 + batch), weight=WEIGHTS[batch % 4])
    return measured.finish(expected=sum(SHAPES.values()))


@pytest.mark.parametrize(("world", "batches"), [(2, 5), (3, 6), (4, 3)])
def test_ranks_that_share_out_the_batches_have_the_record_of_one_process(world: int, batches: int) -> None:
    """Also its prefixes, that of the last batch too, with an uneven share and with a rank that has no batch."""
    whole, together = shared_out(batches), Together(world)

    def one(rank: int) -> GradientRecord:
        share = BatchShare(rank=rank, world=world, batches=batches, all_reduce=together.all_reduce)
        return shared_out(batches, share, range(rank, batches, world))

    with ThreadPoolExecutor(world) as pool:
        records = list(pool.map(one, range(world)))
    assert list(whole.prefixes) == [count for count in (1, 2, 3, 6) if count <= batches]
    assert whole.batches == batches
    for record in records:
        assert numbers(record) == pytest.approx(numbers(whole), rel=1e-6)


def test_a_batch_that_no_rank_added_is_an_error_not_a_number() -> None:
    alone = BatchShare(rank=0, world=1, batches=4, all_reduce=Together(1).all_reduce)
    with pytest.raises(LionError, match="the ranks added 3 batches of 4"):
        shared_out(4, alone, range(3))


def test_parts_hold_the_norms_of_their_elements_and_only_those_that_exist() -> None:
    record = measure(None).finish()
    assert list(record.parts["layers"]) == ["1", "2"]
    assert record.parts["kinds"]["norm"].d == 30
    assert sum(part.d for part in record.parts["kinds"].values()) == record.d
    squares = sum(part.l2**2 for part in record.parts["layers"].values())
    assert math.sqrt(squares) == pytest.approx(record.l2)


def test_a_parameter_that_no_rank_counted_or_two_did_is_an_error_not_a_number() -> None:
    with pytest.raises(LionError, match="counted 5107 parameters of 5108"):
        measure(None).finish(expected=sum(SHAPES.values()) + 1)


def test_a_tag_that_other_ranks_do_not_know_is_refused() -> None:
    with pytest.raises(LionError, match="not among those of the round"):
        GradientRound([counted("mlp.9", torch.ones(2))], tags=TAGS)
