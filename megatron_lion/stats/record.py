"""What a measurement leaves behind: the numbers of one round, and the line of JSON that they become."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lion.stats.sums import GradientSums


@dataclass(frozen=True, kw_only=True)
class Part:
    """The norms of some of the parameters, such as those of one layer."""

    d: int
    l1: float
    l2: float
    ratio: float
    ratio_over_sqrt_d: float

    @classmethod
    def of(cls, sums: GradientSums) -> "Part":
        """The part whose elements ``sums`` are of."""
        return cls(d=sums.d, l1=sums.l1, l2=sums.l2, ratio=sums.ratio, ratio_over_sqrt_d=sums.ratio_over_sqrt_d)


@dataclass(frozen=True, kw_only=True)
class GradientRecord:
    """One round's numbers; the keys are those of ``norm_ratio.jsonl``."""

    batches: int
    loss: float
    """mean over the batches"""
    l1: float
    l2: float
    d: int
    """parameters counted, each once"""
    d_padding: int
    """of which in padded vocabulary rows"""
    ratio: float
    """l1 / l2; NaN for a zero gradient"""
    ratio_over_sqrt_d: float
    nonfinite: int
    """elements whose gradient or value is NaN or infinite; above 0 no other number can be trusted"""
    linf_param: float
    linf_weighted: float
    """max lambda * |theta|, at most 1 inside the box"""
    kkt_residual: float
    prefixes: dict[int, float]
    """the ratio after the first 10, 25, 50 batches, and half of them, as far as there were so many"""
    sigma2: float | None
    """variance of one batch's gradient, estimated by :func:`stats.noise_estimate`, as are the next two"""
    noise_scale: float | None
    """in batches"""
    snr: float | None
    """of the mean gradient"""
    converged: bool | None
    """the rule of :func:`stats.has_converged`; None where it cannot be said. True for an exact gradient"""
    exact: bool = False
    """the batches were a whole split, each sample once, and nothing was drawn: the gradient has no sampling noise"""
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    """by what the parameters were told apart, such as ``kinds`` and ``layers``, then by name"""
    seconds: float

    def to_json(self, first: Mapping[str, Any] | None = None) -> str:
        """One line of JSON, the keys of ``first`` before the record's own.

        NaN and infinities, which JSON lacks, become null; ``nonfinite`` tells of bad elements.
        """
        return json.dumps(_finite_or_null({**(first or {}), **asdict(self)}), allow_nan=False)


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
