"""Sums over gradient elements that can be added up over tensors, shards and ranks; the mean gradient they are taken of.

Every element is counted where its sums are made: whoever calls :meth:`GradientSums.from_tensors` decides which elements
this rank counts. Nothing here issues a collective but :meth:`MeanGradient.over_ranks`, which is given it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_lion.config import LionError, check_non_negative

# Elements that are held in float64 at a time: 8 MiB for each temporary.
CHUNK = 1 << 20

# Tensors with fewer elements have their mean kept in float64; MeanGradient says why.
FP64_BELOW = 1 << 12


@dataclass(frozen=True, kw_only=True)
class GradientSums:
    """What the norm ratio and the KKT residual need of a set of elements (theta, g), each with its group's lambda.

    All in float64, d's as exact integers. ``a + b`` is the sums of both sets; ``GradientSums()`` those of none. The
    addition commutes exactly and is associative up to the rounding of float64 (exactly, where the sums are integers
    below 2^53). A NaN or an infinity is never lost: it stays in the sums of what it entered, is counted in
    ``nonfinite``, and makes a maximum inf (not NaN, which a maximum over ranks may drop).
    """

    l1: float = 0.0
    """sum |g|"""
    l2_squared: float = 0.0
    """sum g^2; 0 also where all |g| < 1e-162, whose squares float64 does not hold (float32 gradients never are)"""
    weighted_inner: float = 0.0
    """sum lambda * theta * g; its rounding is relative to sum |lambda theta g|, of which much may cancel"""
    d: int = 0
    """elements counted"""
    d_padding: int = 0
    """of which in padded vocabulary rows"""
    nonfinite: int = 0
    """of which with a NaN or infinite g or theta"""
    linf_param: float = 0.0
    """max |theta|"""
    linf_weighted: float = 0.0
    """max lambda * |theta|: at most 1 inside the box ||theta||_inf <= 1/lambda"""

    @classmethod
    @torch.no_grad()
    def from_tensors(
        cls, grad: Tensor | None, param: Tensor, weight_decay: float = 0.0, *, padding: int = 0
    ) -> "GradientSums":
        """The sums over one tensor, or one shard of it. Memory: a few chunks of ``CHUNK`` elements in float64.

        Args:
            grad: g, any shape and real dtype; None counts as zeros.
            param: theta, the same shape, any real dtype, on the same device.
            weight_decay: lambda of the parameter's group, >= 0.
            padding: how many of the elements are padding.

        Waits once for the device. Modifies nothing. Raises LionError for different shapes, a sparse gradient or a
        padding or weight decay out of range.
        """
        weight_decay = check_non_negative("weight_decay", weight_decay)
        if not 0 <= padding <= param.numel():
            raise LionError(f"padding must lie between 0 and the {param.numel()} elements given, got {padding}")
        if grad is None:
            grad = param.new_zeros(()).expand_as(param)
        _check_dense(grad)
        if grad.shape != param.shape:
            raise LionError(f"gradient of shape {tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}")
        total = torch.zeros(4, dtype=torch.float64, device=param.device)
        for g, theta in _pieces(grad, param):
            piece = _piece_sums(g, theta, inner=weight_decay > 0.0)
            total = torch.cat((total[:3] + piece[:3], torch.maximum(total[3:], piece[3:])))
        l1, l2_squared, inner, linf = total.tolist()
        nonfinite = 0 if math.isfinite(l1) and math.isfinite(linf) else _count_nonfinite(grad, param)
        linf = math.inf if math.isnan(linf) else linf
        return cls(
            l1=l1,
            l2_squared=l2_squared,
            weighted_inner=weight_decay * inner,
            d=param.numel(),
            d_padding=padding,
            nonfinite=nonfinite,
            linf_param=linf,
            linf_weighted=weight_decay * linf if weight_decay > 0.0 else 0.0,
        )

    def __add__(self, other: "GradientSums") -> "GradientSums":
        """The sums over both sets of elements, which must have none in common."""
        summed = {name: getattr(self, name) + getattr(other, name) for name in SUMMED}
        return GradientSums(**summed, **{name: max(getattr(self, name), getattr(other, name)) for name in MAXIMA})

    def merge(self, other: "GradientSums") -> "GradientSums":
        """``self + other``."""
        return self + other

    def to_vector(self, rank: int = 0, world: int = 1) -> Tensor:
        """The sums as float64, shape ``(len(SUMMED) + len(MAXIMA) * world,)``, for ONE all-reduce with SUM.

        A maximum travels one-hot: each rank writes its own into its own slot, the others' are 0, and
        :meth:`from_vector` takes the largest slot. So no second all-reduce with MAX is needed, and none may drop a NaN.
        Integers are exact below 2^53. On the CPU; move it to where the all-reduce wants it.
        """
        vector = torch.zeros(len(SUMMED) + len(MAXIMA) * world, dtype=torch.float64)
        vector[: len(SUMMED)] = torch.tensor([float(getattr(self, name)) for name in SUMMED], dtype=torch.float64)
        maxima = torch.tensor([getattr(self, name) for name in MAXIMA], dtype=torch.float64)
        vector[len(SUMMED) :].view(len(MAXIMA), world)[:, rank] = maxima
        return vector

    @classmethod
    def from_vector(cls, vector: Tensor, world: int = 1) -> "GradientSums":
        """The sums over all ranks, from the sum of their :meth:`to_vector`. Raises LionError for another length."""
        expected = len(SUMMED) + len(MAXIMA) * world
        if vector.shape != (expected,):
            raise LionError(f"a vector of {world} ranks has shape ({expected},), got {tuple(vector.shape)}")
        summed = dict(zip(SUMMED, vector[: len(SUMMED)].tolist(), strict=True))
        summed |= {name: round(summed[name]) for name in COUNTS}
        maxima = vector[len(SUMMED) :].view(len(MAXIMA), world).amax(dim=1).tolist()
        return cls(**summed, **dict(zip(MAXIMA, maxima, strict=True)))

    @property
    def l2(self) -> float:
        """||g||_2"""
        return math.sqrt(self.l2_squared)

    @property
    def ratio(self) -> float:
        """r = ||g||_1 / ||g||_2, between 1 and sqrt(d). NaN for a zero gradient, which has no direction."""
        return self.l1 / self.l2 if self.l2_squared != 0.0 else math.nan

    @property
    def ratio_over_sqrt_d(self) -> float:
        """r / sqrt(d), at most 1; sqrt(2 / pi) = 0.798 for an isotropic Gaussian. NaN for a zero gradient."""
        return self.ratio / math.sqrt(self.d) if self.d else math.nan

    @property
    def kkt_residual(self) -> float:
        """sum over groups of lambda * <g, theta> + ||g||_1: 0 at a KKT point, >= 0 in the box (Lemma 1, Theorem 2 i).

        A group with lambda 0 is unconstrained and contributes ||g||_1. Up to rounding of 1e-15 times ``l1``.
        """
        return self.l1 + self.weighted_inner


MAXIMA = ("linf_param", "linf_weighted")
COUNTS = ("d", "d_padding", "nonfinite")
SUMMED = tuple(field.name for field in fields(GradientSums) if field.name not in MAXIMA)


def pack(sums: Sequence[GradientSums], rank: int = 0, world: int = 1) -> Tensor:
    """Several sums (a round's prefixes, layers, kinds) one after the other, for one all-reduce with SUM."""
    return torch.cat([one.to_vector(rank, world) for one in sums])


def unpack(vector: Tensor, world: int = 1) -> list[GradientSums]:
    """What :func:`pack` packed, summed over all ranks."""
    return [GradientSums.from_vector(part, world) for part in torch.split(vector, len(SUMMED) + len(MAXIMA) * world)]


class MeanGradient:
    """The weighted mean of batch gradients, and the sum of their squared norms that sigma^2 is estimated from.

    Memory: one float32 copy of the parameters (float64 of float64 parameters and of tensors below ``FP64_BELOW``
    elements, 16 KiB more each at most); while a batch is added, one tensor's gradient in that dtype besides.

    The accumulator holds the running mean, mean += (w / W) * (g - mean), not a sum. In a sum, which grows, gradients
    that resemble each other round the same way each time: l1 of 5,000 nearly equal ones was off by 2e-5. In the mean
    each step rounds by half a unit of the mean itself, and where a step is too small to count, so is what it would
    have changed: after 5,000 batches, from no noise to noise alone, elements are off by 1e-6 of their size (rms). The
    signs of these errors are random over elements, so l1 and l2 of n elements are right to about 1e-6 / sqrt(n), 3e-8
    from ``FP64_BELOW`` elements on. Smaller tensors get float64. So both stay within 1e-6 of a float64 sum without a
    second copy.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.means = [torch.zeros_like(param, dtype=_mean_dtype(param), requires_grad=False) for param in params]
        self.batches = 0
        self.weight = 0.0
        self._weighted_squares: float | Tensor = 0.0

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add one batch's gradients, in the order of the parameters; None counts as zeros. ``grads`` stay as they are.

        Args:
            grads: what the batch's loss gives, any floating-point dtype.
            weight: w > 0, how much the batch counts, such as its number of samples.
        """
        for grad in grads:
            if grad is not None:
                _check_dense(grad)
        self.batches += 1
        self.weight += weight
        share = weight / self.weight
        for mean, grad in zip(self.means, grads, strict=True):
            if grad is None:
                mean.mul_(1.0 - share)
            else:
                mean.lerp_(grad.to(mean.dtype), share)
        self._weighted_squares = weight * squared_norm(grads) + self._weighted_squares

    @torch.no_grad()
    def over_ranks(self, all_reduce: Callable[[Tensor], object]) -> "MeanGradient":
        """The mean over the batches of all ranks, where each added batches of its own; the same on every rank.

        Args:
            all_reduce: sums a tensor over the ranks in place. Called for a float64 vector on the CPU, then for each
                tensor, on its device and in its dtype.

        Modifies nothing. Memory: one more copy, as long as the result lives.
        """
        found = MeanGradient(self.means)
        numbers = torch.tensor([self.batches, self.weight, float(self._weighted_squares)], dtype=torch.float64)
        all_reduce(numbers)
        batches, found.weight, found._weighted_squares = numbers.tolist()
        found.batches = round(batches)
        for mean, own in zip(found.means, self.means, strict=True):
            torch.mul(own, self.weight / found.weight if found.weight else 0.0, out=mean)
            all_reduce(mean)
        return found

    @property
    def sum_squared(self) -> float:
        """sum_b (w_b / mean w) * ||g_b||^2, over the elements held here; a sum over ranks gives that of the whole."""
        return float(self._weighted_squares) * self.batches / self.weight if self.batches else 0.0


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """sum g^2 over all tensors in float64, chunk by chunk, shape (); None counts as zeros. Waits for no device."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        if tensor is not None:
            for piece, _ in _pieces(tensor, tensor):
                flat = piece.double().reshape(-1)  # a dot product reads it once; square and sum would write it too
                total = torch.dot(flat, flat) + total.to(piece.device, non_blocking=True)
    return total


def _check_dense(grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise LionError(f"the norms need dense gradients, got layout {grad.layout}: build the embedding without sparse")


def _mean_dtype(param: Tensor) -> torch.dtype:
    small = param.numel() < FP64_BELOW
    return torch.float64 if small or param.dtype == torch.float64 else torch.float32


def _pieces(grad: Tensor, param: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both, element for element, of at most ``CHUNK`` elements. Halving copies nothing, for any strides."""
    if 0 < param.numel() <= CHUNK:
        yield grad, param
    elif param.numel():
        longest = max(range(param.dim()), key=lambda dim: param.shape[dim])
        for g, theta in zip(grad.chunk(2, longest), param.chunk(2, longest), strict=True):
            yield from _pieces(g, theta)


def _piece_sums(grad: Tensor, param: Tensor, *, inner: bool) -> Tensor:
    """[sum |g|, sum g^2, <theta, g> or 0, max |theta|] in float64, on the device; NaN stays NaN."""
    g = grad.double()
    products = (param.double() * g).sum() if inner else torch.zeros((), dtype=torch.float64, device=g.device)
    return torch.stack((g.abs().sum(), g.square().sum(), products, param.abs().amax().double()))


def _count_nonfinite(grad: Tensor, param: Tensor) -> int:
    finite = [int((g.isfinite() & theta.isfinite()).sum()) for g, theta in _pieces(grad, param)]
    return param.numel() - sum(finite)
