"""The optimizers' names and their signatures; like Apex's, ``FusedAdam`` counts steps in its parameter groups."""

from collections.abc import Callable
from typing import Any

import torch

from tests.stand_ins import extensions

FusedSGD = torch.optim.SGD


class FusedAdam(torch.optim.Optimizer):
    """AdamW in torch."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(param))
                lists = [[param.grad], [param], [state["exp_avg"]], [state["exp_avg_sq"]]]
                settings = (group["lr"], *group["betas"], group["eps"], group["step"], 1, 1, group["weight_decay"])
                extensions.adam(0, None, lists, *settings)
