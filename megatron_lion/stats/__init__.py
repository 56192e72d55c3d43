"""The norm ratio r = ||g||_1 / ||g||_2 of a mean gradient, and whether the mean has outgrown its noise.

``sums`` holds what is added up over tensors and ranks, ``convergence`` says how far the estimate can be trusted,
``round`` adds up one measurement, ``record`` is what it leaves, ``full_gradient`` measures any plain PyTorch model in
one call.
"""

from megatron_lion.stats.convergence import NoiseEstimate, has_converged, noise_estimate, round_prefixes
from megatron_lion.stats.full_gradient import full_gradient
from megatron_lion.stats.record import GradientRecord, Part
from megatron_lion.stats.round import BatchShare, Counted, GradientRound
from megatron_lion.stats.sums import GradientSums, MeanGradient, pack, squared_norm, unpack

__all__ = [
    "BatchShare",
    "Counted",
    "GradientRecord",
    "GradientRound",
    "GradientSums",
    "MeanGradient",
    "NoiseEstimate",
    "Part",
    "full_gradient",
    "has_converged",
    "noise_estimate",
    "pack",
    "round_prefixes",
    "squared_norm",
    "unpack",
]
