"""Records the loss that Megatron's schedule differentiates."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.integration import compat


class BatchLoss:
    """One rank's share of each batch's mean loss, and the batch's weight in the round's mean.

    As the schedule scales it (schedules 328 in 0.19.2): over the micro-batches and data-parallel ranks a mean of
    sum / tokens, or of the loss itself where the loss function gives no number of tokens. With
    ``--calculate-per-token-loss`` the batch's sum over the batch's tokens, and the tokens are its weight.

    Args:
        config: the model's.
    """

    def __init__(self, config: Any) -> None:
        from megatron.core import parallel_state as mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        self._config = config
        self._per_token = config.calculate_per_token_loss
        self._counts = mpu.get_tensor_model_parallel_rank() == 0  # the others have the same loss
        self._context_ranks = mpu.get_context_parallel_world_size()
        self._parts = get_num_microbatches() * mpu.get_data_parallel_world_size(with_context_parallel=True)
        self._sum: float | Tensor = 0.0
        self._tokens = 0.0
        self._factors: list[float] = []

    def scale_next(self, factors: Sequence[float]) -> None:
        """Multiply the losses of the next micro-batches, in order, by ``factors``; 0 leaves a micro-batch out."""
        self._factors = list(factors)

    def recording(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """``forward_step`` with its loss recorded."""

        @functools.wraps(forward_step)
        def recorded_forward_step(*args: Any, **kwargs: Any) -> Any:
            output, loss_func = forward_step(*args, **kwargs)
            return output, self._recorded(loss_func)

        return recorded_forward_step

    def _recorded(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        def recorded_loss(*args: Any, **kwargs: Any) -> Any:
            outputs = loss_func(*args, **kwargs)
            if self._factors:
                outputs = self._scaled(outputs, self._factors.pop(0))
            if self._counts:
                # A copy: the schedule divides the loss in place.
                loss = outputs[0].detach().to(torch.float64, copy=True).reshape(())
                if len(outputs) < 3:
                    loss = loss * self._context_ranks
                elif not self._per_token:
                    loss = loss / torch.clamp(outputs[1], min=1)
                self._sum = loss + self._sum
            return outputs

        return recorded_loss

    def _scaled(self, outputs: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
        loss, *rest = outputs
        if self._per_token:  # the tokens are the weight: a sample counts as it is, or not at all
            rest[0] = rest[0] * (factor > 0.0)
            factor = float(factor > 0.0)
        return (loss * factor, *rest)

    @contextlib.contextmanager
    def tokens_counted(self) -> Iterator[None]:
        """Record the number of tokens that Megatron sums over all ranks when it finalizes gradients."""
        stock_finalize = self._config.finalize_model_grads_func

        @functools.wraps(stock_finalize)
        def finalize_model_grads(model: Any, num_tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
            result = stock_finalize(model, num_tokens, *args, **kwargs)
            if num_tokens is not None:
                self._tokens = float(num_tokens)
            return result

        with compat.temporarily(self._config, finalize_model_grads_func=finalize_model_grads):
            yield

    def take(self) -> tuple[float | Tensor, float]:
        """This rank's share of the mean loss of the batch that just ran, and the batch's weight; starts a new batch."""
        total, self._sum = self._sum, 0.0
        if not self._per_token:
            return total / self._parts, 1.0
        if self._tokens <= 0.0:
            raise LionError(
                "--calculate-per-token-loss is on, but a batch of the norm ratio counted no token: the loss function "
                "must return the loss, its number of tokens, and what to log"
            )
        return total / self._tokens, self._tokens
