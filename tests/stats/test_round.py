"""A round whose elements lie on several ranks gives the record of one process, with one all-reduce."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.stats import Counted, GradientRecord, GradientRound

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
