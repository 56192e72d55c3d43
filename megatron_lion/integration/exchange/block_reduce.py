"""The compressed reduction of one distributed optimizer: its residuals from step to step, and at a save."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import LionOptions
from megatron_lion.integration import compat, console
from megatron_lion.integration.exchange.bucket_reduction import BucketReduction
from megatron_lion.integration.exchange.groups import bucket_groups_of, buffer_of, param_starts
from megatron_lion.integration.exchange.levels import Levels, levels_of
from megatron_lion.integration.exchange.reducing_groups import ReducingBucketGroup, convert, convert_buffer
from megatron_lion.kernels.reduce import choose_reduce
from megatron_lion.update import lion_sign


@dataclass
class Sampled:
    """Sums over this rank's part of one sampled step."""

    gradient: float = 0.0
    """squares of the gradient that was compressed"""
    residual: float = 0.0
    """squares of its residual"""
    unlike: float = 0.0
    """elements with another sign(c) than with the uncompressed gradient"""
    elements: float = 0.0
    """elements of which that was counted"""


class BlockReduce:
    """Keeps the residuals of ``groups``, converted bucket groups of ``optimizer``, a distributed optimizer of Lion."""

    def __init__(self, optimizer: Any, groups: Sequence[ReducingBucketGroup]) -> None:
        self._optimizer = optimizer
        self.groups = list(groups)
        self._clip: float = 1.0
        self._loss_scale = self._current_loss_scale()
        self.has_residuals = False
        """Whether a step has left residuals that are not zero."""
        self._unlike = (0.0, 0.0)

    @property
    def buckets(self) -> list[BucketReduction]:
        """The buckets of all groups that are compressed."""
        return [bucket for group in self.groups for bucket in group.reductions if bucket.is_compressed]

    @property
    def buffers(self) -> list[Any]:
        """Megatron's gradient buffers."""
        buffers: list[Any] = self._optimizer.buffers
        return buffers

    @property
    def residual_bytes(self) -> int:
        """Bytes of this rank's residuals."""
        return sum(residual.nbytes for bucket in self.buckets for residual in bucket.residuals.values())

    def note_loss_scale(self) -> None:
        """Before the gradients are unscaled, which may change the loss scale, as a load does."""
        self._loss_scale = self._current_loss_scale()

    @property
    def awaits_step(self) -> bool:
        """Whether gradients were reduced that no step has used yet."""
        return any(bucket.awaits_step for bucket in self.buckets)

    def take_repeats(self) -> bool:
        """Whether the backward pass was repeated since this was last asked, which drops the residuals."""
        repeated = [bucket for bucket in self.buckets if bucket.was_repeated]
        for bucket in repeated:
            bucket.was_repeated = False
        return bool(repeated)

    def begin_step(self) -> None:
        """Before Lion's step, with its clip factor known."""
        self._clip = float(self._optimizer.optimizer.grad_scale)
        if any(bucket.sample is not None and bucket.sample.exact is not None for bucket in self.buckets):
            self._unlike = self._count_unlike_signs()

    def end_step(self, *, made: bool) -> None:
        """After a step. If it was skipped, the residuals become zero, because they may have a NaN."""
        for bucket in self.buckets:
            bucket.awaits_step = False
        if not made:
            self.clear()
            return
        self.has_residuals = self.residual_bytes > 0
        if (scale := self._current_loss_scale()) != self._loss_scale:
            for bucket in self.buckets:
                bucket.scale_(scale / self._loss_scale)
            self._loss_scale = scale

    def clear(self) -> None:
        """Set the residuals to zero."""
        for bucket in self.buckets:
            bucket.clear()
        self.has_residuals = False

    @torch.no_grad()
    def flush(self) -> bool:
        """Move the residuals into the momentum of their owners. Returns whether there were any.

        Had the last step received all of the gradient, its momentum would be larger by::

            (1 - beta2) clip (sum of the residuals of all ranks)

        in the units of the step. After a reduction without a step, as where Megatron saves because a loss was NaN, the
        residuals are of gradients that no step has used, and are dropped. Issues one reduce of fp32 for each shard of
        each bucket.
        """
        if self.awaits_step:
            self.clear()
        if not self.has_residuals:
            return False
        lion = self._optimizer.optimizer
        for bucket in self.buckets:  # one by one, which needs less memory
            for shard, group, left in self._compressed_shards({bucket: bucket.sum_residuals()}):
                missing = left.view(shard.shape) * ((1.0 - group["betas"][1]) * self._clip)
                lion.set_scaled_state(shard, "exp_avg", lion.get_unscaled_state(shard, "exp_avg") + missing)
        self.clear()
        return True

    def sample_next(self, what: str | None) -> None:
        """Measure the next reduction: "norm", or "exact" for the uncompressed sum too, or None."""
        for bucket in self.buckets:
            bucket.sampling = what

    def take_sample(self) -> Sampled:
        """The sums of the reduction that was measured, and of what it left."""
        taken = Sampled(0.0, 0.0, *self._unlike)
        for bucket in self.buckets:
            if bucket.sample is None:
                continue
            taken.gradient += float(bucket.sample.gradient)
            values = (residual.values(bucket.numel) for residual in bucket.residuals.values())
            taken.residual += sum(float(value.double().square().sum()) for value in values)
            bucket.sample = None
        self._unlike = (0.0, 0.0)
        return taken

    def _count_unlike_signs(self) -> tuple[float, float]:
        """Elements whose sign(c) the uncompressed gradient would change, and all that were compressed."""
        lion = self._optimizer.optimizer
        uncompressed = {
            bucket: bucket.sample.exact
            for bucket in self.buckets
            if bucket.sample is not None and bucket.sample.exact is not None
        }
        counts = []
        for shard, group, exact in self._compressed_shards(uncompressed):
            if not lion.state[shard]:
                continue
            momentum = lion.get_unscaled_state(shard, "exp_avg").view(-1)
            received = compat.gradient_of(self._optimizer, shard).view(-1).float()
            signs = (lion_sign(gradient * self._clip, momentum, group["betas"][0]) for gradient in (received, exact))
            counts.append((torch.ne(*signs).sum(), shard.numel()))
        return float(sum(int(unlike) for unlike, _ in counts)), float(sum(numel for _, numel in counts))

    def _compressed_shards(
        self, sums: dict[BucketReduction, Tensor]
    ) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """Each shard of a compressed parameter in the buckets of ``sums``, its parameter group, and its part of the
        bucket's sum in the units of the step before clipping. ``sums`` has this rank's shard of each bucket, fp32."""
        scaled = {id(bucket.bucket): (bucket, total * self._units(bucket)) for bucket, total in sums.items()}
        for param, shard, group in compat.updated_params(self._optimizer):
            of_param, start, stop = compat.range_in_bucket(self._optimizer, param)
            bucket, total = scaled.get(id(of_param), (None, None))
            if bucket is None or total is None or param in bucket.exact_params:
                continue
            first = start - start % total.numel()
            yield shard, group, total[start - first : stop - first]

    def _units(self, bucket: BucketReduction) -> float | Tensor:
        """The factor from the gradient buffer's units, as they were reduced, to those of the step before clipping."""
        scaled_by: float | Tensor = buffer_of(self._optimizer, bucket.bucket).scaled_by
        return scaled_by / self._loss_scale

    def _current_loss_scale(self) -> float:
        """1 unless the gradients are those of a scaled loss: with fp16, or with ``--loss-scale``."""
        scaler = self._optimizer.grad_scaler
        return 1.0 if scaler is None else float(scaler.scale)


def install(options: LionOptions, optimizer: Any) -> None:
    """Let every distributed optimizer in the chain ``optimizer`` reduce gradients in packed blocks, where it has more
    than one rank and a parameter that can be compressed."""
    for sub_optimizer in _on_several_ranks(optimizer):
        groups = []
        levels: dict[Any, Levels] = {}
        for group in bucket_groups_of(sub_optimizer):
            ranks = group.intra_distributed_optimizer_instance_group
            if ranks not in levels:
                levels[ranks] = levels_of(ranks)
            reductions = [_reduction(options, sub_optimizer, bucket, levels[ranks]) for bucket in group.buckets]
            if any(reduction.is_compressed for reduction in reductions):
                groups.append(convert(group, reductions))
        for buffer in sub_optimizer.buffers:
            convert_buffer(buffer)
        sub_optimizer.block_reduce = BlockReduce(sub_optimizer, groups)


def _on_several_ranks(optimizer: Any) -> list[Any]:
    """The distributed optimizers in the chain ``optimizer`` that reduce gradients. A stub has no parameters."""
    with_params = [each for each in compat.sub_optimizers_of(optimizer) if not each.is_stub_optimizer]
    return [sub_optimizer for sub_optimizer in with_params if sub_optimizer.data_parallel_group.size() > 1]


def _reduction(options: LionOptions, sub_optimizer: Any, bucket: Any, levels: Levels) -> BucketReduction:
    starts = param_starts(sub_optimizer, bucket)
    return BucketReduction(
        bucket,
        starts,
        levels,
        choose_reduce(options.kernel, bucket.grad_data.device),
        code=options.reduce,
        feedback=options.error_feedback,
        exact=[param for param in starts if compat.is_copied_over_tp(sub_optimizer, param)],
    )


def reduces_of(optimizer: Any) -> list[BlockReduce]:
    """The compressed reductions of the optimizers in the chain ``optimizer``."""
    found = (getattr(sub_optimizer, "block_reduce", None) for sub_optimizer in compat.sub_optimizers_of(optimizer))
    return [reduce for reduce in found if reduce is not None]


def before_step(optimizer: Any) -> None:
    """Before a step of the chain ``optimizer``."""
    for reduce in reduces_of(optimizer):
        reduce.note_loss_scale()


def after_step(optimizer: Any, *, made: bool) -> None:
    """After a step of the chain ``optimizer``, or one that was skipped on every rank."""
    reduces = reduces_of(optimizer)
    repeated = any([reduce.take_repeats() for reduce in reduces])
    if not made or repeated:
        _say_dropped(reduces, "the backward pass was repeated" if made else "the step was skipped")
    for reduce in reduces:
        reduce.end_step(made=made)


def flush(optimizer: Any) -> bool:
    """Before a save: move the residuals into the momentum. Returns whether there were any."""
    reduces = reduces_of(optimizer)
    if any(reduce.awaits_step for reduce in reduces):
        _say_dropped(reduces, "the save is inside a step")
    return any([reduce.flush() for reduce in reduces])


def _say_dropped(reduces: list[BlockReduce], why: str) -> None:
    if any(reduce.has_residuals for reduce in reduces):
        console.say(f"--lion-reduce: {why}, so what earlier steps had not sent is dropped")


def announce_save(optimizer: Any, iteration: int, intervals: Iterable[int | None]) -> None:
    """Say if a save after step ``iteration`` is at none of ``intervals``: a run without it would train differently."""
    if not any(reduce.has_residuals for reduce in reduces_of(optimizer)):
        return
    if not any(interval and iteration % interval == 0 for interval in intervals):
        console.say(
            f"--lion-reduce: the save after step {iteration} is not at the save interval. It moves what was not sent "
            "into the momentum, so from here on this run differs from one without this save"
        )


@contextlib.contextmanager
def exact_gradients(optimizer: Any) -> Iterator[None]:
    """Reduce gradients as Megatron does, and leave the residuals and their units as they are."""
    with contextlib.ExitStack() as restored:
        for reduce in reduces_of(optimizer):
            for group in reduce.groups:
                restored.enter_context(compat.temporarily(group, compresses=False))
            for buffer in reduce.buffers:
                restored.enter_context(compat.temporarily(buffer, scaled_by=buffer.scaled_by))
        yield


def describe(options: LionOptions, optimizer: Any) -> str:
    """The reduction in use, for the start-up line."""
    buckets = [bucket for reduce in reduces_of(optimizer) for bucket in reduce.buckets]
    if not buckets:
        sends = _on_several_ranks(optimizer)
        return "no reduction to compress (1-D parameters only)" if sends else "no reduction (DP=1)"
    forms = [form for bucket in buckets for form in bucket.forms]  # all ranks': what they send on the whole
    bits = 8 * sum(form.nbytes for form in forms) / sum(form.numel for form in forms)
    stock = 8 * buckets[0].bucket.grad_data.element_size()
    kept = sum(reduce.residual_bytes for reduce in reduces_of(optimizer))
    feedback = f"{options.error_feedback} error feedback {kept / 1e6:.1f} MB" if kept else "no error feedback"
    where = "" if buckets[0].levels.inner is None else " between nodes"
    return (
        f"experimental {options.reduce} reduction of gradients{where} ({buckets[0].kernels.name}, {bits:.2f} bits per "
        f"parameter instead of {stock}, {feedback})"
    )
