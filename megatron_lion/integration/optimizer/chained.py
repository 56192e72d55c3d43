"""Megatron's chain of optimizers, with Lion: updates are all-or-nothing, and the clip factor is folded into them."""

import contextlib
import functools
import math
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration import compat, console
from megatron_lion.integration.checkpoint import group_settings
from megatron_lion.integration.checkpoint.formats import EXPERTS_APART
from megatron_lion.integration.exchange import block_reduce
from megatron_lion.integration.optimizer import fast_norm
from megatron_lion.integration.optimizer.offload import LIONS
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.precision import BLOCK
from megatron_lion.step import on_host


class LionChainedOptimizer(ChainedOptimizer):
    """Megatron's chain of dense and expert optimizers. It skips an update if the gradient norm is not finite.

    The norm is reduced over all ranks, so every rank skips, and no parameter or momentum changes. Without this, as
    torch's sign(NaN) is 0, Lion would keep a NaN momentum and silently stop updating those elements. Megatron
    counts the iteration as skipped. Its own check (``check_for_nan_in_loss_and_grad``, on by default) ends the run
    earlier.

    The factor of ``--clip-grad`` is folded into the step, which saves a pass that reads and writes every gradient. For
    fp32 gradients the bits are those of Megatron's scaled gradient: the same product, rounded the same way. The
    gradient buffers keep the unscaled gradient.
    """

    options: LionOptions  # set when the chain has been built
    _is_loaded = False

    @compat.overrides
    def __init__(self, chained_optimizers: list[Any]) -> None:
        super().__init__(chained_optimizers)
        self._own_settings = group_settings.GroupSettings(chained_optimizers)

    @compat.overrides
    def get_grad_norm(self) -> Any:
        with fast_norm.used_if_asked(self.options):
            self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    @compat.overrides
    @torch.no_grad()
    def step(self) -> Any:
        block_reduce.before_step(self)
        with compat.folding_the_clip_factor(self._fold):
            result = super().step()
        block_reduce.after_step(self, made=result[0])
        return result

    def _fold(self, parameters: list[torch.Tensor], factor: float | torch.Tensor) -> bool:
        """Let the sub-optimizer that has exactly these parameters apply ``factor``. Returns whether there is one.

        There is none if a sub-optimizer has a second group with a separate norm, for multi-token prediction.
        """
        for sub_optimizer in self.chained_optimizers:
            mine = sub_optimizer.get_parameters() if isinstance(sub_optimizer.optimizer, LIONS) else []
            if len(mine) == len(parameters) and all(one is two for one, two in zip(mine, parameters, strict=True)):
                sub_optimizer.optimizer.grad_scale = factor
                return True
        return False

    @compat.overrides
    def step_with_ready_grads(self) -> bool:
        try:
            return self._step_if_finite()
        finally:
            for lion in self._lions():
                lion.grad_scale = 1.0

    def _step_if_finite(self) -> bool:
        """Step unless a rank has a NaN or an infinity. Reads all that the host needs with at most one wait.

        Issues one all-reduce of two numbers if ranks must agree, and in the first step after a load.
        """
        agreed = self._over_ranks() if self._is_loaded or self._must_agree else (0.0, 0.0)
        scaled = [lion for lion in self._lions() if isinstance(lion.grad_scale, torch.Tensor)]
        norm, bad, waiting, *factors = on_host(self._grad_norm, *agreed, *(lion.grad_scale for lion in scaled))
        if bad or not math.isfinite(norm):
            console.warn(f"gradient norm {norm}: this update is skipped, nothing was changed")
            return False
        if waiting:
            console.say(
                f"int8 momentum: {waiting:.0f} elements over all ranks were not saved in these blocks of {BLOCK}; "
                "their loaded fp32 values are used in this step, which quantizes them"
            )
        self._is_loaded = False
        for lion, factor in zip(scaled, factors, strict=True):
            lion.grad_scale = factor
        return bool(super().step_with_ready_grads())

    def _over_ranks(self) -> tuple[torch.Tensor, ...]:
        """How many ranks have a gradient that is not finite, and how many elements are to be quantized, on the device.

        Nothing here waits for the device: numbers go there as arguments of a kernel, not as copies.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        size, waiting = sums[:1], sums[1:]
        size.add_(self._grad_norm)
        grads = (compat.gradient_of(sub_optimizer, param) for sub_optimizer, param in self._outside_the_norm)
        if unseen := [grad for grad in grads if grad is not None]:
            size.add_(torch.stack(torch._foreach_norm(unseen)).double().sum())
        size.copy_(size.isfinite().logical_not())
        waiting.add_(self._unquantized() if self._is_loaded else 0)
        torch.distributed.all_reduce(sums)
        return sums.unbind()

    @functools.cached_property
    def _must_agree(self) -> bool:
        """Whether a rank could have a NaN that the norm of another does not show. Issues one all-reduce, once.

        The norm leaves out some gradients that Lion uses: of parameters that are not split, on every tensor-parallel
        rank but the first; of a tied copy; of multi-token prediction. Without the distributed optimizer it is not
        reduced over data-parallel ranks.
        """
        partial = not all(map(compat.reduces_norm_over_all_ranks, self.chained_optimizers))
        found = bool(partial or self._outside_the_norm)
        ranks = torch.full((1,), float(found), device=torch.cuda.current_device())
        torch.distributed.all_reduce(ranks)
        return bool(ranks)

    def _lions(self) -> list[Any]:
        inner = [sub_optimizer.optimizer for sub_optimizer in self.chained_optimizers]
        return [optimizer for optimizer in inner if isinstance(optimizer, LIONS)]

    def _unquantized(self) -> int:
        return sum(
            sub_optimizer.optimizer.unquantized()
            for sub_optimizer in self.chained_optimizers
            if isinstance(sub_optimizer.optimizer, ShardedLion)
        )

    @functools.cached_property
    def _outside_the_norm(self) -> list[tuple[Any, torch.Tensor]]:
        """Parameters that the gradient norm leaves out, with their sub-optimizer; found when there are gradients."""
        return [
            (sub_optimizer, param)
            for sub_optimizer in self.chained_optimizers
            for param in compat.params_outside_the_norm(sub_optimizer)
        ]

    def _settings_kept(self, state_dict: Any) -> contextlib.AbstractContextManager[Any]:
        from_run = self.options.rates_from_run
        return group_settings.kept(self._own_settings, self.chained_optimizers, state_dict, from_run=from_run)

    @compat.overrides
    def load_state_dict(self, state_dict: Any) -> None:
        self._is_loaded = True
        try:
            with self._settings_kept(state_dict) as with_own_settings:
                super().load_state_dict(with_own_settings)
        except RuntimeError as error:
            if not str(error).startswith("Expected "):  # as many optimizers as this run has (0.19.2: optimizer 1579)
                raise
            raise LionError(EXPERTS_APART) from error
        except ValueError as error:
            if not str(error).startswith("Could not find parameter group"):  # (0.19.2: optimizer 642)
                raise
            raise LionError(group_settings.NO_SUCH_GROUP) from error
