"""The norm ratio r = ||g||_1 / ||g||_2 of a mean gradient, and whether the mean has outgrown its noise.

``sums`` holds what is added up over tensors and ranks, ``convergence`` says how far the estimate can be trusted,
``full_gradient`` measures any plain PyTorch model in one call.
"""

from megatron_lion.stats.convergence import NoiseEstimate, has_converged, noise_estimate
from megatron_lion.stats.full_gradient import GradientRecord, full_gradient
from megatron_lion.stats.sums import GradientSums, MeanGradient, pack, squared_norm, unpack

__all__ = [
    "GradientRecord",
    "GradientSums",
    "MeanGradient",
    "NoiseEstimate",
    "full_gradient",
    "has_converged",
    "noise_estimate",
    "pack",
    "squared_norm",
    "unpack",
]
