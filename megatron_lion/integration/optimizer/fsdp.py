"""Lion under Megatron-FSDP (``--use-megatron-fsdp``): its masters and gradients are DTensors, Lion's state is local.

Megatron-FSDP shards weights, gradients and fp32 main weights itself, and passes the main weights to the optimizer. Lion
steps each rank's local tensors. Line numbers are megatron-core 0.19.2's.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.integration import compat, console
from megatron_lion.integration.checkpoint import group_settings
from megatron_lion.integration.checkpoint.init_from_adam import MOMENTUM
from megatron_lion.integration.optimizer.distributed import init_lion_state
from megatron_lion.integration.optimizer.repaired import StatelessStepDistributedOptimizer
from megatron_lion.lion import KEPT_ON_LOAD
from megatron_lion.precision import BLOCK, BlockLayout
from megatron_lion.step import local_tensor


class LionFSDPOptimizer(StatelessStepDistributedOptimizer):
    """Megatron's distributed optimizer around Lion, in the form that it has under Megatron-FSDP.

    ``fsdp_dtensor`` checkpoints hold fp32 momentum in any storage precision, as a DTensor with its parameter's
    placements, so that any number of ranks and any precision can read them.
    """

    state_keys = ("exp_avg",)
    init_state = staticmethod(init_lion_state)
    options: Any  # LionOptions, set when the optimizer has been built

    @compat.overrides
    def __init__(self, optimizer: torch.optim.Optimizer | None, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, config, *args, **kwargs)
        if optimizer is None:
            return
        self.optimizer.blocks = {param: _layout(param) for param in self._params()}
        if any(group["momentum_dtype"] == "int8" for group in optimizer.param_groups):
            self._require_whole_blocks()

    def _params(self) -> Iterator[Any]:
        return (param for group in self.optimizer.param_groups for param in group["params"])

    def _require_whole_blocks(self) -> None:
        """Raise LionError, on every rank, where a shard of any rank cuts a block of 8-bit momentum.

        Issues one gather of names over all ranks.
        """
        cut = [
            f"{self._param_name(param)} of shape {tuple(param.shape)}"
            for param in self._params()
            if self.optimizer.blocks[param].splits_a_block(local_tensor(param.detach()).numel())
        ]
        gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, cut[:1])
        if found := [name for names in gathered for name in names]:
            raise LionError(
                f"--lion-momentum-dtype int8: with Megatron-FSDP on {len(gathered)} ranks a shard boundary cuts a "
                f"block of {BLOCK} elements in {found[0]}. Use --lion-momentum-dtype bf16, or another number of ranks"
            )

    @compat.overrides
    def sharded_param_state_fsdp_dtensor(self, is_loading: bool = False) -> dict[str, Any]:
        """State by parameter name, which a load then writes into. Issues no collective.

        Every rank has state for the same parameters. Stock has none for a parameter of which the rank holds no element,
        and saving waits for ever for that rank (Megatron issues 4910 and 6573). On a load, stock makes state by a step.
        """
        self.optimizer.init_state()
        state = {self._param_name(param): {"exp_avg": self._momentum(param)} for param in self._params()}
        groups = [_without(group, KEPT_ON_LOAD) for group in self.optimizer.param_groups]
        return {"state": state, "param_to_group_meta": self._param_groups_to_param2group_meta(groups)}

    def _momentum(self, param: Any) -> Tensor:
        """The momentum of ``param`` in fp32, placed as it is. Shares memory with the state if that is fp32."""
        from torch.distributed.tensor import DTensor

        values = self.optimizer.get_unscaled_state(param, "exp_avg")
        return DTensor.from_local(
            values, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Install what was loaded into the result of :meth:`sharded_param_state_fsdp_dtensor`.

        Without saved settings of groups, the state was Adam's and was asked for with ``--lion-init-from``.
        """
        saved, state = state_dict["param_to_group_meta"], state_dict["state"]
        if not saved:
            console.say(f"continuing an Adam run: master weights kept, momentum {MOMENTUM[self.options.init_from]}")
        values = {name: {"exp_avg": local_tensor(tensors["exp_avg"])} for name, tensors in state.items()}
        groups = [self._loaded_group(group, saved) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
        self.optimizer.init_state()  # of what was not loaded

    def _loaded_group(self, group: dict[str, Any], saved: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """``group`` with the settings that it has after the load, and the names of its parameters."""
        names = [self._param_name(param) for param in group["params"]]
        if not saved or not names:
            return {**group, "params": names}
        first, *others = (saved[name] for name in names)
        if self.options.rates_from_run:
            return {**group, "betas": first["betas"], "params": names}
        if any(other != first for other in others):
            raise LionError(group_settings.NO_SUCH_GROUP)
        return {**group, **first, "params": names}

    @compat.overrides
    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """Nothing to do: an ``fsdp_dtensor`` checkpoint has the main weights. Stock raises an error here (3080)."""

    def sharding(self) -> str:
        """How state is sharded, for the start-up line."""
        strategy = self.ddp_config.data_parallel_sharding_strategy
        if strategy == "no_shard":
            return f"Megatron-FSDP {strategy}, state on every rank, not sharded"
        param = next(self._params())
        mesh, tensor_parallel = param.device_mesh, param.megatron_fsdp_dist_index.tp_dim
        dims = zip(param.placements, mesh.shape, mesh.mesh_dim_names, strict=True)
        ranks = math.prod(size for place, size, name in dims if place.is_shard() and name != tensor_parallel)
        return f"Megatron-FSDP {strategy}, state sharded over DP={ranks}"

    def master_bytes(self) -> int:
        """Bytes of this rank's fp32 main weights of 16-bit parameters."""
        buffers = (
            group.main_weight_buffer
            for chunk in self.model_chunks
            for group in chunk.param_and_grad_buffer.parameter_groups
        )
        return sum(buffer.data.numel() * buffer.data.element_size() for buffer in buffers if buffer is not None)


def in_a_chain(optimizer: Any, chain: Callable[[list[Any]], Any]) -> Any:
    """``optimizer``, which Megatron returns without a chain under Megatron-FSDP (optimizer/__init__ 1128), in one."""
    return optimizer if hasattr(optimizer, "chained_optimizers") else chain([optimizer])


def _layout(param: Any) -> BlockLayout:
    """The position of this rank's shard in the tensor-parallel rank's parameter."""
    return BlockLayout(compat.fsdp_range(param)[0], BlockLayout.of_whole(compat.original(param)).row_length)


def _without(group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in names}
