"""Megatron's distributed optimizer with its checkpoint formats repaired, for any inner optimizer."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import group_settings
from megatron_lion.integration.compat.sharding import DistributedOptimizer


class RepairedDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer with correct checkpoints for any buckets.

    ``fully_reshardable``: up to 0.19.2 the gathered state lacks the padding between buckets, but is cut at offsets that
    include it, so every parameter after the first bucket is saved shifted (Megatron issue 5077, fixed in 0.20). Tied
    embeddings on two pipeline stages already make several buckets. Here the padding is inserted before the state is
    cut.

    ``dp_reshardable``: a bucket is saved up to its unpadded end. Each rank describes its piece as parameters and gaps
    between them. Up to 0.19.2 a gap at the beginning of a piece may extend beyond the unpadded end, and saving fails
    (Megatron pull request 5898). A piece without a parameter is refused on saving and not found on loading (6191). Here
    gaps end with the bucket and are zero, where stock saves uninitialized memory. Remove this when both are released.
    """

    @compat.overrides
    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        if not compat.installed_traits().shifts_reshardable_state:
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)
        gather_state = self.get_parameter_state_dp_zero

        def gather_state_with_padding(**options: Any) -> Any:
            return self._put_padding_back(gather_state(**options))

        with compat.temporarily(self, get_parameter_state_dp_zero=gather_state_with_padding):
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)

    def _put_padding_back(self, state: dict[Any, Any] | None) -> dict[Any, Any] | None:
        """Each whole tensor of ``state`` in the coordinates of its buffer; None where a rank gathered nothing."""
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for key, compact in list(tensors.items()):
                    if isinstance(compact, torch.Tensor):
                        tensors[key] = self._padded(compact, buffer)
        return state

    @staticmethod
    def _padded(compact: torch.Tensor, buffer: Any) -> torch.Tensor:
        padded = compact.new_zeros(sum(bucket.grad_data.numel() for bucket in buffer.buckets))
        start_compact = start_padded = 0
        for bucket in buffer.buckets:
            numel = bucket.numel_unpadded
            padded[start_padded : start_padded + numel] = compact[start_compact : start_compact + numel]
            start_compact += numel
            start_padded += bucket.grad_data.numel()
        return padded

    @compat.overrides
    @torch.no_grad()  # in fp32 the shards are views of parameters, which autograd would not let it write (1225)
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        super()._set_main_param_and_optimizer_states(model_param, tensors)

    @compat.overrides
    def get_parameter_state_dp_reshardable(self) -> Any:
        """As Megatron's, with an empty parameter in each bucket in which this rank has none."""
        state = super().get_parameter_state_dp_reshardable()
        nothing = dict.fromkeys(
            ("param", *self.optimizer_state_keys), torch.empty(0, device=torch.cuda.current_device())
        )
        for bucket in _buckets(state):
            if not bucket:
                bucket.append({**nothing, "gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True})
        return state

    @compat.overrides
    def sharded_param_state_dp_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        state = super().sharded_param_state_dp_reshardable(*args, **kwargs)
        for bucket in _buckets(state):
            for piece in bucket:
                if piece["padding"].unwrap():
                    _end_where_the_bucket_does(piece)
        return state


class StatelessStepDistributedOptimizer(RepairedDistributedOptimizer):
    """The distributed optimizer around an optimizer with one state tensor per parameter and key, and no ``step``.

    Subclasses name the keys and how the state begins. Collectives are Megatron's own: a reduce-scatter of gradients
    before the step, an all-gather of parameters after it.
    """

    state_keys: tuple[str, ...]
    init_state: Callable[..., None]

    @compat.overrides
    def __init__(
        self, optimizer: torch.optim.Optimizer | None, config: Any, grad_scaler: Any, init_state_fn: Any, **kwargs: Any
    ) -> None:
        super().__init__(optimizer, config, grad_scaler, type(self).init_state, **kwargs)

    @compat.overrides  # type: ignore[prop-decorator]
    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return self.state_keys

    @compat.overrides
    def state_dict(self) -> dict[str, Any]:
        with compat.without_step():
            return super().state_dict()

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            with compat.without_step():
                super().load_state_dict(state_dict)
        except KeyError as error:
            if not isinstance(error.args[0], tuple):
                raise
            # Megatron finds each saved group by these settings, learning rates among them (0.19.2: 980).
            raise LionError(group_settings.NO_SUCH_GROUP) from error


def _buckets(state: dict[Any, Any]) -> Iterator[list[dict[str, Any]]]:
    """The pieces of each bucket in what ``get_parameter_state_dp_reshardable`` returns: by buffer, dtype and bucket."""
    for buffer, by_dtype in state.items():
        if isinstance(buffer, int):  # other keys: per_bucket_numel and per_bucket_numel_unpadded
            for buckets in by_dtype.values():
                yield from buckets


def _end_where_the_bucket_does(gap: dict[str, Any]) -> None:
    """Cut the tensors of ``gap`` at the end of the bucket's unpadded part and make them zero; drop those left empty."""
    for key, tensor in list(gap.items()):
        if not isinstance(tensor, ShardedTensor):
            continue
        length = min(tensor.local_shape[0], tensor.global_shape[0] - tensor.global_offset[0])
        if length <= 0:
            del gap[key]
        else:
            gap[key] = replace(tensor, data=torch.zeros_like(tensor.data[:length]), local_shape=(length,))
