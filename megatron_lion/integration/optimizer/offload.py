"""Lion under Megatron's ``--optimizer-cpu-offload``: its HybridDeviceOptimizer with Lion on both sides.

Megatron moves the masters and the momentum of a fraction of the parameters to the CPU, copies their gradients there,
steps them there and copies the new values back into the 16-bit parameters. On the CPU that step is the fused kernel.
Masters and momenta are fp32 on either side, and the bits are those of a run without the flag.
"""

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_lion.config import LionOptions
from megatron_lion.integration import compat
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.lion import Grads
from megatron_lion.plan import GroupPlan

# Group settings that come from the run's command line and not from a checkpoint.
OF_THIS_RUN = (
    "offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32", "pin_cpu_grads",
    "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d", "kernel",
)  # fmt: skip


# How a run without the flag stores its state; here it is fp32.
OF_PLAIN_LION = ("momentum_dtype", "master_weights")


class HalfOfLion(ShardedLion):
    """Lion on the parameters of one side. HybridDeviceOptimizer hands over groups and nothing else."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)

    def _ready(self, group: dict[str, Any]) -> tuple[Grads, GroupPlan | None]:
        # The parameter is an fp32 master, which HybridDeviceOptimizer also puts into the state after every step.
        for param in group["params"]:
            self.state.get(param, {}).pop("master_param", None)
        return super()._ready(group)


class HostLion(HalfOfLion):
    """The CPU's side. It has its own class, by which HybridDeviceOptimizer tells the sides apart (417)."""


class DeviceLion(HalfOfLion):
    """The device's side."""


class OffloadingLion(HybridDeviceOptimizer):
    """HybridDeviceOptimizer around two Lions, with what :class:`ShardedLion` offers to the distributed optimizer."""

    @property
    def grad_scale(self) -> float:
        """The factor on every gradient of the next step."""
        return self.sub_optimizers[0].grad_scale

    @grad_scale.setter
    def grad_scale(self, factor: float) -> None:
        for side in self.sub_optimizers:
            side.grad_scale = factor

    def init_state(self) -> None:
        """Zero momentum for every parameter. Megatron's way to make state is a step on random gradients (928)."""
        for side in self.sub_optimizers:
            side.init_state()
        self._sync_sub_optimizers_state_to_hdo()

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """``exp_avg`` or ``master_param`` of ``param``, fp32, on the side that has it."""
        return self.state[param][name]

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of momentum and of masters, both sides together."""
        numel = sum(param.numel() for group in self.param_groups for param in group["params"])
        return 4 * numel, 4 * numel

    def host_parameters(self) -> list[Tensor]:
        """The fp32 parameters that are stepped on the CPU."""
        return [param for side in self.cpu_optimizers for group in side.param_groups for param in group["params"]]

    def device_parameters(self) -> list[Tensor]:
        """The fp32 parameters that are stepped on the device."""
        sides = [side for side in self.sub_optimizers if isinstance(side, DeviceLion)]
        return [param for side in sides for group in side.param_groups for param in group["params"]]

    @compat.overrides
    def state_dict(self) -> dict[str, Any]:
        """As HybridDeviceOptimizer, without the settings of this run, so that any run can read it."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for key in OF_THIS_RUN:
                del group[key]
        return state_dict

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As HybridDeviceOptimizer, also from a run that offloaded another fraction or none."""
        groups = []
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            kept = {key: group[key] for key in OF_THIS_RUN}
            groups.append({key: value for key, value in saved.items() if key not in OF_PLAIN_LION} | kept)
        super().load_state_dict({**state_dict, "param_groups": groups})


# Lion as the distributed optimizer may hold it.
LIONS = (ShardedLion, OffloadingLion)


def build(
    options: LionOptions, param_groups: Any, *, momentum: float, cpu_optimizer_cls: Any, gpu_optimizer_cls: Any,
    **settings: Any,
) -> OffloadingLion:  # fmt: skip
    """Megatron calls this in the place of HybridDeviceOptimizer, with SGD's settings."""
    return OffloadingLion(
        param_groups,
        cpu_optimizer_cls=HostLion,
        gpu_optimizer_cls=DeviceLion,
        betas=options.betas,
        momentum_init="zero",
        maximize=False,
        kernel=options.kernel,
        **settings,
    )
