"""The distributed optimizer of Megatron 0.19, also for older releases.

From 0.19 it takes any optimizer that comes with an ``init_state_fn``, and asks ``optimizer_state_keys`` which tensors a
parameter's state has. Before, it accepts only Adam: it asserts this, and the methods that gather and scatter state name
Adam's two tensors. Everything else is the same, so no method is rewritten here.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_lion.integration.compat.overriding import overrides
from megatron_lion.integration.compat.patching import temporarily
from megatron_lion.integration.compat.seams import ADAM_STATE
from megatron_lion.integration.compat.versions import installed_traits

DistributedOptimizer: Any = distrib_optimizer.DistributedOptimizer

if not installed_traits().asks_for_state_keys:

    class OlderDistributedOptimizer(distrib_optimizer.DistributedOptimizer):
        """The distributed optimizer of 0.16 to 0.18 (lines are 0.18.2's), as 0.19 has it. Collectives are its own."""

        @overrides
        def __init__(
            self,
            optimizer: torch.optim.Optimizer | None,
            config: Any,
            grad_scaler: Any,
            init_state_fn: Any,
            **kwargs: Any,
        ) -> None:
            # The assertion (665) looks up the class under this name and accepts a tuple of tuples.
            with temporarily(distrib_optimizer, Adam=(distrib_optimizer.Adam, type(optimizer))):
                super().__init__(optimizer, config, grad_scaler, init_state_fn, **kwargs)

        @property
        def optimizer_state_keys(self) -> tuple[str, ...]:
            """The tensors that a parameter's state has."""
            return ADAM_STATE[1:]

        @overrides
        def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
            return self._with_own_keys(super().get_parameter_state_dp_zero)(*args, **kwargs)

        @overrides
        def load_parameter_state_from_dp_zero(self, *args: Any, **kwargs: Any) -> None:
            self._with_own_keys(super().load_parameter_state_from_dp_zero)(*args, **kwargs)

        @overrides
        def load_parameter_state_from_dp_zero_legacy(self, *args: Any, **kwargs: Any) -> None:
            self._with_own_keys(super().load_parameter_state_from_dp_zero_legacy)(*args, **kwargs)

        @overrides
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Load as 0.19 does, which allocates the state that this optimizer has instead of Adam's (946)."""
            if not self.optimizer.state:
                self.init_state_fn(self.optimizer, self.config)
            drop = self.optimizer.register_load_state_dict_pre_hook(self._without_foreign_keys)
            try:
                super().load_state_dict(state_dict)
            finally:
                drop.remove()

        def _without_foreign_keys(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            foreign = {*ADAM_STATE[1:]} - {*self.optimizer_state_keys}
            state = {
                index: {key: value for key, value in tensors.items() if key not in foreign}
                for index, tensors in state_dict["state"].items()
            }
            return {**state_dict, "state": state}

        def _with_own_keys(self, method: Callable[..., Any]) -> Callable[..., Any]:
            """``method`` of Megatron's class, with this optimizer's tensors in place of its constant with Adam's."""
            stock = method.__func__  # type: ignore[attr-defined]
            own = (ADAM_STATE[0], *self.optimizer_state_keys)
            code = stock.__code__.replace(
                co_consts=tuple(own if constant == ADAM_STATE else constant for constant in stock.__code__.co_consts)
            )
            function = types.FunctionType(
                code, stock.__globals__, stock.__name__, stock.__defaults__, stock.__closure__
            )
            function.__kwdefaults__ = stock.__kwdefaults__
            return types.MethodType(function, self)

    DistributedOptimizer = OlderDistributedOptimizer
