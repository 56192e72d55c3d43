"""One round: batch gradients go in one after the other, a record comes out, on one process or over many ranks."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.stats.convergence import PREFIXES, check_prefixes, has_converged, noise_estimate
from megatron_lion.stats.record import GradientRecord, Part
from megatron_lion.stats.sums import GradientSums, MeanGradient, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Elements of one parameter that this process counts, and no other does."""

    name: str
    value: Tensor
    """theta: a whole parameter or a shard of it, any shape"""
    weight_decay: float
    """lambda of the parameter's group"""
    padding: int = 0
    """how many of the elements lie in padded vocabulary rows"""
    tags: tuple[tuple[str, str], ...] = ()
    """the parts that they belong to, such as ``(("kinds", "mlp"), ("layers", "3"))``"""


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Which of a round's batches this process adds, where ranks share them out: every ``world``-th from ``rank`` on."""

    rank: int
    world: int
    batches: int
    """of all ranks together"""
    all_reduce: Callable[[Tensor], object]
    """sums a tensor over the ranks in place: float64 on the CPU, and the mean gradient's on their own device"""

    def own(self, batches: int) -> int:
        """How many of the first ``batches`` are this rank's."""
        return len(range(self.rank, batches, self.world))


class GradientRound:
    """The mean gradient of a round and everything that is recorded of it.

    The loss and the weights of the batches come with their gradients. Over several ranks each holds the elements that
    it counts, adds the same batches in the same order, and gives the share of the loss that no other rank gives. With
    ``share``, each rank counts all elements and adds only its own batches.

    Memory: one float32 copy of the counted elements (:class:`stats.MeanGradient`), two for a moment with ``share``.

    Args:
        counted: what this process counts.
        tags: every tag there is on any rank, in the same order on each. The record's ``parts`` follow it.
        prefixes: after how many batches the ratio is recorded too.
        share: the batches that are this rank's. ``add`` then issues its collectives at the prefixes, which are those of
            the batches of all ranks, and ``finish`` some more.
        exact: the batches are a whole split, each sample once, and the loss draws nothing at random. The record then
            says so, and that the ratio has converged.
    """

    def __init__(
        self,
        counted: Sequence[Counted],
        *,
        tags: Sequence[tuple[str, str]] = (),
        prefixes: Iterable[int] = PREFIXES,
        share: BatchShare | None = None,
        exact: bool = False,
    ) -> None:
        self.counted = counted
        self.exact = exact
        self.share = share
        self.tags = tuple(tags)
        self.mean = MeanGradient([one.value for one in counted])
        self._recorded: dict[int, list[int]] = {}  # by how many batches are here when so many are there on all ranks
        for count in check_prefixes(prefixes):
            if share is None or count <= share.batches:  # one that not all ranks reach would be waited for
                self._recorded.setdefault(share.own(count) if share else count, []).append(count)
        self._prefixes: dict[int, GradientSums] = {}
        self._weighted_loss: float | Tensor = 0.0
        self._start = time.perf_counter()
        unknown = {tag for one in counted for tag in one.tags} - set(self.tags)
        if unknown:
            raise LionError(f"counted tensors have the tags {sorted(unknown)}, which are not among those of the round")
        self._record_prefixes()  # those of which this rank has no batch

    def add(self, grads: Sequence[Tensor | None], *, loss: float | Tensor, weight: float = 1.0) -> None:
        """Add one batch. ``grads`` stay as they are and may be overwritten afterwards.

        Args:
            grads: in the order of ``counted``; None counts as zeros.
            loss: this process's share of the batch's mean loss; the shares of all ranks are summed at the end.
            weight: of the batch, > 0, and the same on every rank unless they share out the batches.
        """
        self.mean.add(grads, weight)
        # A tensor is not waited for: the sum stays on its device.
        self._weighted_loss = weight * (loss.double() if isinstance(loss, Tensor) else loss) + self._weighted_loss
        self._record_prefixes()

    def finish(
        self,
        all_reduce: Callable[[Tensor], object] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        expected: int | None = None,
    ) -> GradientRecord:
        """The record of all batches added, the same on every rank.

        Args:
            all_reduce: sums a float64 vector on the CPU over all ranks, in place. Called once; None for one process.
            rank, world: of this process among those that ``all_reduce`` sums over.
            expected: this process's share of the number of elements that should have been counted.

        Raises:
            LionError: where another number of elements was counted than the ranks expected together, or of batches
                added than ``share`` has.
        """
        if self.share:
            self._gather(self.share)
        each = self._sums(self.mean)
        packed = pack([*self._prefixes.values(), sum(each, GradientSums()), *self._by_tag(each)], rank, world)
        scalars = [float(self._weighted_loss), self.mean.sum_squared, float(expected or 0)]
        vector = torch.cat((torch.tensor(scalars, dtype=torch.float64), packed))
        if all_reduce is not None:
            all_reduce(vector)
        weighted_loss, sum_squared, should_be = vector[: len(scalars)].tolist()
        sums = unpack(vector[len(scalars) :], world)
        at_prefix, total, by_tag = (
            sums[: len(self._prefixes)],
            sums[len(self._prefixes)],
            sums[len(self._prefixes) + 1 :],
        )
        if expected is not None and total.d != round(should_be):
            raise LionError(
                f"the norm ratio counted {total.d} parameters of {round(should_be)}: this layout is one that its "
                "counting does not know, and its numbers would be wrong"
            )
        ratios = {count: part.ratio for count, part in zip(self._prefixes, at_prefix, strict=True)}
        parts: dict[str, dict[str, Part]] = {}
        for (what, name), part in zip(self.tags, by_tag, strict=True):
            if part.d:
                parts.setdefault(what, {})[name] = Part.of(part)
        return self._record(total, weighted_loss / self.mean.weight, sum_squared, ratios, parts)

    def _record(
        self,
        sums: GradientSums,
        loss: float,
        sum_squared: float,
        ratios: dict[int, float],
        parts: dict[str, dict[str, Part]],
    ) -> GradientRecord:
        batches = self.mean.batches
        noise = noise_estimate(batches, sum_squared, sums.l2_squared)
        return GradientRecord(
            batches=batches,
            loss=loss,
            l1=sums.l1,
            l2=sums.l2,
            d=sums.d,
            d_padding=sums.d_padding,
            ratio=sums.ratio,
            ratio_over_sqrt_d=sums.ratio_over_sqrt_d,
            nonfinite=sums.nonfinite,
            linf_param=sums.linf_param,
            linf_weighted=sums.linf_weighted,
            kkt_residual=sums.kkt_residual,
            prefixes=ratios,
            sigma2=noise.sigma2 if noise else None,
            noise_scale=noise.noise_scale if noise else None,
            snr=noise.snr if noise else None,
            converged=self.exact or has_converged(batches, sums.ratio, ratios, noise.snr if noise else None),
            exact=self.exact,
            parts=parts,
            seconds=time.perf_counter() - self._start,
        )

    def _record_prefixes(self) -> None:
        for count in self._recorded.get(self.mean.batches, ()):
            mean = self.mean.over_ranks(self.share.all_reduce) if self.share else self.mean
            self._prefixes[count] = sum(self._sums(mean), GradientSums())

    def _gather(self, share: BatchShare) -> None:
        """Make this the round of all ranks' batches."""
        self.mean = self.mean.over_ranks(share.all_reduce)
        loss = torch.tensor(float(self._weighted_loss), dtype=torch.float64)
        share.all_reduce(loss)
        self._weighted_loss = float(loss)
        if self.mean.batches != share.batches:
            raise LionError(
                f"the ranks added {self.mean.batches} batches of {share.batches}: each must add all its own"
            )

    def _sums(self, mean: MeanGradient) -> list[GradientSums]:
        return [
            GradientSums.from_tensors(part, one.value, one.weight_decay, padding=one.padding)
            for part, one in zip(mean.means, self.counted, strict=True)
        ]

    def _by_tag(self, each: Sequence[GradientSums]) -> list[GradientSums]:
        totals = dict.fromkeys(self.tags, GradientSums())
        for one, sums in zip(self.counted, each, strict=True):
            for tag in one.tags:
                totals[tag] += sums
        return list(totals.values())
