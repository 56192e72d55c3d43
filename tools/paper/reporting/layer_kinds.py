"""Sums over kinds of layers, as the exact rounds of a record have them: d, l1 and l2 of each kind."""

import math
from collections.abc import Callable, Collection, Mapping

Kind = Mapping[str, float]


def squared_l2(kind: Kind) -> float:
    """||grad f||_2^2 of one kind."""
    return kind["l2"] ** 2


def size_and_ratio(kinds: Collection[Kind]) -> tuple[int, float]:
    """d and r = ||grad f||_1 / ||grad f||_2 of ``kinds`` together. NaN where the gradient is 0."""
    l2 = math.sqrt(sum(map(squared_l2, kinds)))
    l1 = sum(kind["l1"] for kind in kinds)
    return int(sum(kind["d"] for kind in kinds)), l1 / l2 if l2 > 0.0 else math.nan


def part_of(kinds: Mapping[str, Kind], name: str, value: Callable[[Kind], float]) -> float:
    """The part of the sum of ``value`` over all kinds that ``name`` has; 0 where it is missing."""
    return (value(kinds[name]) if name in kinds else 0.0) / sum(map(value, kinds.values()))
