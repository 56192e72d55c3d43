"""Lion for the parameters that Muon does not update: embeddings and those of one dimension.

With ``--optimizer muon --muon-scalar-optimizer lion`` Megatron builds Lion by its name in ``megatron.core.optimizer``
(0.19.2: optimizer/__init__ 604), so this package's class is put there. Muon, its parameter groups and the chain of the
two stay Megatron's.
"""

import contextlib
from typing import Any

from torch.optim.optimizer import ParamsT

from megatron_lion.config import LionError
from megatron_lion.integration import compat, console
from megatron_lion.integration.optimizer import config_fields
from megatron_lion.integration.optimizer.distributed import init_lion_state
from megatron_lion.integration.optimizer.repaired import StatelessStepDistributedOptimizer
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion


class MuonScalarLion(ShardedLion):
    """Lion that also loads what stock Megatron's Lion saved next to Muon."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`ShardedLion.load_state_dict`. Stock's groups lack two settings, and Adam's have ``eps``."""
        groups = state_dict["param_groups"]
        if not any("eps" in group for group in groups):
            added = {"momentum_init": "zero", "maximize": False}
            state_dict = {**state_dict, "param_groups": [{**added, **group} for group in groups]}
        super().load_state_dict(state_dict)


class MuonScalarDistributedOptimizer(StatelessStepDistributedOptimizer):
    """Megatron's distributed optimizer around the Lion that steps what Muon does not update."""

    state_keys = ("exp_avg",)
    init_state = staticmethod(init_lion_state)


def is_asked(config: Any) -> bool:
    """Whether ``config`` is of Muon with Lion."""
    return "muon" in config.optimizer and getattr(config, "muon_scalar_optimizer", None) == "lion"


def options_used(config: Any) -> tuple[str, ...]:
    """The options of Lion that the optimizer of ``config`` may have. Megatron accepts the betas with any Muon."""
    betas = config_fields.BETAS if "muon" in config.optimizer else ()
    return (*betas, "lion_kernel") if is_asked(config) else betas


def lion_for_the_rest(config: Any) -> contextlib.AbstractContextManager[None]:
    """Let Megatron build this package's Lion next to Muon. Its momentum has the dtype of the masters, fp32.

    Raises LionError for a Megatron that would build Adam.
    """
    import megatron.core.optimizer as optimizers

    if not compat.installed_traits().obeys_muon_scalar_optimizer:
        raise LionError(
            f"megatron-core {compat.megatron_version()} ignores --muon-scalar-optimizer lion: what --optimizer "
            f"{config.optimizer} does not update would be on Adam. Use 0.19, or --muon-scalar-optimizer adam"
        )
    config_fields.refuse_earlier_instance(config)

    def lion(params: ParamsT, lr: float, betas: tuple[float, float], weight_decay: float) -> MuonScalarLion:
        built = MuonScalarLion(params, lr=lr, betas=betas, weight_decay=weight_decay, kernel=config.lion_kernel)
        count = sum(len(group["params"]) for group in built.param_groups)
        console.say(
            f"lion on the {count} parameters that --optimizer {config.optimizer} does not update, betas "
            f"({betas[0]:g}, {betas[1]:g})"
        )
        return built

    return compat.temporarily(optimizers, Lion=lion, DistributedOptimizer=MuonScalarDistributedOptimizer)
