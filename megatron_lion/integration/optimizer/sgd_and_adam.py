"""Megatron's distributed optimizer around torch's SGD and Adam, where stock Megatron cannot save or load them."""

from typing import Any

import torch

from megatron_lion.integration import compat
from megatron_lion.integration.optimizer.repaired import RepairedDistributedOptimizer, StatelessStepDistributedOptimizer


def init_sgd_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every parameter of SGD with momentum its buffer. Zero is where torch's own first step starts from."""
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] != 0 else ():
            if optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def init_adam_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every parameter of torch's Adam its state, with the ``step`` that Megatron's own function leaves out."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


class SGDDistributedOptimizer(StatelessStepDistributedOptimizer):
    """Megatron's distributed optimizer around SGD, which stock refuses because SGD has no ``init_state_fn`` (688)."""

    init_state = staticmethod(init_sgd_state)

    @property
    def state_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum_buffer",) if self.config.sgd_momentum != 0 else ()


class TorchAdamDistributedOptimizer(RepairedDistributedOptimizer):
    """Megatron's distributed optimizer around torch's Adam, made able to resume.

    Stock saves such a run but cannot load it: the fresh state has no ``step`` to read (839). If that were fixed, all
    parameters would share one step tensor, which each update increments (1028), or the fresh state's zero would
    overwrite it (1219), or a format would lack it. So the groups' step is used, which every format has.
    """

    @compat.overrides
    def state_dict(self) -> dict[str, Any]:
        if self.optimizer is not None:
            init_adam_state(self.optimizer)
        return super().state_dict()

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        (step,) = {float(group["step"]) for group in state_dict["optimizer"]["param_groups"]}
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    @compat.overrides
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)  # its step stays as it is
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": own["step"]})
