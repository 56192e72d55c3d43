"""Megatron's distributed optimizer around Lion.

The sharding is Megatron's. The class describes the state of Lion, so that Megatron's code allocates, saves, loads and
reshards it.
"""

from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint.init_from_adam import InitFromAdam
from megatron_lion.integration.exchange.block_reduce import BlockReduce
from megatron_lion.integration.exchange.sign_gather import SignGather
from megatron_lion.integration.optimizer.offload import LIONS, OffloadingLion
from megatron_lion.integration.optimizer.repaired import StatelessStepDistributedOptimizer
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.precision import BLOCK, BlockLayout


def init_lion_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every parameter its zero momentum. Megatron calls this before it loads a checkpoint."""
    optimizer.init_state()  # type: ignore[attr-defined]


class LionDistributedOptimizer(InitFromAdam, StatelessStepDistributedOptimizer):
    """Megatron's distributed optimizer around Lion: master weights and ``exp_avg``, each sharded over DP.

    On Megatron's precision-aware path Lion holds the masters, in fp32 or as remainders, and its momentum may have fewer
    bits. Checkpoints hold fp32 values of both on either path, so that any run can read them.
    """

    state_keys = ("exp_avg",)
    init_state = staticmethod(init_lion_state)
    sign_gather: SignGather | None = None
    """Sends the signs of a step instead of the parameters; None for Megatron's own gather."""
    block_reduce: BlockReduce | None = None
    """Reduces gradients in packed blocks; None for Megatron's own reduction."""
    _addresses: tuple[int, ...] | None = None

    @compat.overrides
    def __init__(self, optimizer: torch.optim.Optimizer | None, config: Any, *args: Any, **kwargs: Any) -> None:
        # Of every parameter of the model. The groups of the finished optimizer have only those of this rank's shards.
        groups = [] if optimizer is None else optimizer.param_groups
        self.group_of = {param: number for number, group in enumerate(groups) for param in group["params"]}
        super().__init__(optimizer, config, *args, **kwargs)
        if isinstance(optimizer, ShardedLion) and compat.is_precision_aware(config):
            optimizer.use_decoupled_grad = True
            optimizer.blocks = {
                inner: BlockLayout(compat.shard_range(self, param)[0], BlockLayout.of_whole(param).row_length)
                for param, inner, _ in compat.updated_params(self)
            }
            if any(group["momentum_dtype"] == "int8" for group in optimizer.param_groups):
                self._require_whole_blocks()

    def _inner_param(self, model_param: torch.nn.Parameter) -> torch.Tensor:
        """This rank's shard of ``model_param``, as the inner optimizer has it."""
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]

    def _require_whole_blocks(self) -> None:
        """Raise LionError, on every rank, where a shard of any rank would cut a block of 8-bit momentum."""
        ranks = self.data_parallel_group.size()
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                numel = bucket.grad_data.numel() // ranks
                for param in bucket.params:
                    start = buffer.param_index_map[param][0] - bucket.offset
                    cuts = range(-(-start // numel) * numel, start + param.numel(), numel)
                    layout = BlockLayout.of_whole(param)
                    if any(layout.splits_a_block(cut - start) for cut in cuts):
                        raise LionError(
                            f"--lion-momentum-dtype int8: with DP={ranks} a shard boundary cuts a block of {BLOCK} "
                            f"elements in a parameter of shape {tuple(param.shape)}. Use --lion-momentum-dtype bf16, "
                            "or in a script without Megatron's command line "
                            "DistributedDataParallelConfig(pad_buckets_for_high_nccl_busbw=True)"
                        )

    @compat.overrides
    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        if not compat.is_precision_aware(self.config):
            return super()._get_main_param_and_optimizer_states(model_param)
        shard = self._inner_param(model_param)
        master, momentum = (self.optimizer.get_unscaled_state(shard, name) for name in ("master_param", "exp_avg"))
        return {"param": master, "exp_avg": momentum}

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self.optimizer, LIONS):
            self.optimizer.init_state()  # Megatron would allocate other tensors
        self._require_full_gather()
        if self.block_reduce is not None:
            self.block_reduce.clear()
        super().load_state_dict(state_dict)

    @compat.overrides
    def load_parameter_state(self, *args: Any, **kwargs: Any) -> None:
        self._require_full_gather()
        super().load_parameter_state(*args, **kwargs)

    def _require_full_gather(self) -> None:
        """After parameters or masters were replaced: other ranks can no longer repeat a step."""
        if self.sign_gather is not None:
            self.sign_gather.require_full()

    @compat.overrides
    def load_parameter_state_from_dp_reshardable(self, state_dict: Any) -> None:
        super().load_parameter_state_from_dp_reshardable(state_dict)
        if isinstance(self.optimizer, OffloadingLion):
            # Stock forgets this for its default format (2062), and continues with zero momentum and with masters made
            # from the 16-bit parameters.
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    @compat.overrides
    @torch.no_grad()
    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """Masters from the model's parameters, after these were loaded. Stock leaves stale ones on this path (3086)."""
        self._require_full_gather()
        offloads = isinstance(self.optimizer, OffloadingLion)  # stock has a branch for it
        if self.is_stub_optimizer or offloads or not compat.is_precision_aware(self.config):
            super()._copy_model_params_to_main_params(state_dict)
            return
        if state_dict is not None:
            raise LionError(
                "Lion's master weights cannot be taken from another state dict when Lion stores them: load the "
                "parameters first, then call reload_model_params() without one"
            )
        for _, shard, _ in compat.updated_params(self):
            if self.optimizer.state[shard]:  # else it is made from the parameter at the first step
                self.optimizer.set_scaled_state(shard, "master_param", shard.float())

    @compat.overrides
    def step_with_ready_grads(self) -> bool:
        """Step. Lion writes the 16-bit parameters itself, so Megatron's copy after it is skipped."""
        if self.is_stub_optimizer:
            return bool(super().step_with_ready_grads())
        lion_copies = not compat.is_precision_aware(self.config) and self._let_lion_copy()
        copy = (lambda: None) if lion_copies else self._copy_main_params_to_model_params
        gather = self.sign_gather

        def copy_and_prepare_to_send() -> None:
            copy()
            if gather is not None:
                gather.end_step()

        if gather is not None:
            gather.begin_step()
        if self.block_reduce is not None:
            self.block_reduce.begin_step()
        # Called between the update of the masters and the gather of the parameters.
        with compat.temporarily(self, _copy_main_params_to_model_params=copy_and_prepare_to_send):
            return bool(super().step_with_ready_grads())

    def _let_lion_copy(self) -> bool:
        """Give Lion this rank's slice of every bf16 parameter. Returns whether it then writes all that Megatron would.

        It does not for quantized parameters, and for fp16 ones only if their signs are to be sent. fp32 parameters are
        their own master.
        """
        buckets = [bucket for buffer in self.buffers for bucket in buffer.buckets]
        addresses = tuple(0 if bucket.param_data is None else bucket.param_data.data_ptr() for bucket in buckets)
        if addresses != self._addresses:  # buffers may be freed and allocated again
            self.optimizer.model_copies = {
                shard: self._slice(param)
                for shards, params in zip(self.shard_fp32_from_float16_groups, self.model_float16_groups, strict=True)
                for shard, param in zip(shards, params, strict=True)
                if shard is not None and self.lion_copies(param)
            }
            self._addresses = addresses
        shards = sum(len(group) for group in self.shard_fp32_from_float16_groups)
        return len(self.optimizer.model_copies) == shards

    def lion_copies(self, param: torch.nn.Parameter) -> bool:
        """Whether Lion writes ``param`` as a copy of its fp32 master, where Megatron holds the master."""
        copied = (torch.bfloat16,) if self.sign_gather is None else (torch.bfloat16, torch.float16)
        return param.dtype in copied and not compat.is_quantized(param)

    def _slice(self, param: torch.nn.Parameter) -> torch.Tensor:
        bucket, start, stop = compat.range_in_bucket(self, param)
        return bucket.param_data.view(-1)[start:stop].detach()
