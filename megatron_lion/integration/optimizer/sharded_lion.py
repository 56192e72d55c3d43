"""Lion with the inputs and queries that Megatron's optimizers need."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import check_choice
from megatron_lion.lion import Grads, Lion
from megatron_lion.plan import GroupPlan, present
from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepScalars, local_tensor
from megatron_lion.storage import State, master_values, momentum_values, storage_of
from megatron_lion.telemetry import Telemetry


class ShardedLion(Lion):
    """:class:`Lion` on one rank's shards of the parameters, stepped by Megatron's distributed optimizer.

    The attributes below are set by that optimizer and act from the next step on. They are class attributes because an
    unpickled optimizer has only its groups and state. Issues no collective.
    """

    grad_scale: float | Tensor = 1.0
    """Multiplies every gradient, such as a clip factor."""
    skip: Tensor | None = None
    """One int32 element. If it is not 0, a step changes nothing. Kernels on a GPU read it there, unless the step sets
    momentum outside of the kernel: to the first gradient, or from fp32 to int8."""
    model_copies: Mapping[Tensor, Tensor] = MappingProxyType({})
    """For each parameter: a 16-bit copy that the step writes as well. To change one, assign a mapping."""
    digits: Mapping[Tensor, Tensor] = MappingProxyType({})
    """For each parameter: uint8, in which the step leaves what other ranks need to repeat it."""
    blocks: Mapping[Tensor, BlockLayout] = MappingProxyType({})
    """Position of each shard in its parameter. The default is a whole parameter. To change one, assign a mapping."""
    use_decoupled_grad: bool = False
    """Read gradients from ``decoupled_grad``, which may have another dtype than the parameter, instead of ``grad``."""
    counted: Collection[Tensor] | None = None
    """The parameters that ``telemetry`` includes; None for all."""

    def init_state(self) -> None:
        """Create zero momentum for each parameter without state. Megatron needs it before it loads a checkpoint."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self._create_state(param, group)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of momentum and of master weights, including state that is not yet allocated."""
        sizes = [
            storage_of(group).sizes(self._stored(param), self._block_layout(param))
            for group in self.param_groups
            for param in group["params"]
        ]
        return sum(momentum for momentum, _ in sizes), sum(master for _, master in sizes)

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return ``exp_avg`` or ``master_param`` of ``param`` in fp32, whatever its storage.

        Together with :meth:`set_scaled_state` this is the interface between Megatron's precision-aware optimizer and
        Transformer Engine's FusedAdam. The result is a new tensor only if it is stored in another form.
        """
        if name == "exp_avg":
            return momentum_values(self.state[param], self._block_layout(param))
        check_choice("state", name, ("exp_avg", "master_param"))
        return master_values(self.state[param], self._stored(param))

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Store fp32 ``value`` as ``exp_avg`` or ``master_param`` of ``param``, which must have state.

        Momentum that int8 would change stays in fp32 until the first step. With remainders, setting ``master_param``
        also writes the bf16 parameter.
        """
        group = next(group for group in self.param_groups if any(param is other for other in group["params"]))
        if name == "exp_avg":
            stored, layout = self._stored(param), self._block_layout(param)
            storage_of(group).set_momentum(self.state[param], stored, value, layout, exact=True)
        else:
            check_choice("state", name, ("exp_avg", "master_param"))
            storage_of(group).set_master(self.state[param], self._stored(param), value)

    def unquantized(self) -> int:
        """Number of elements with loaded momentum that is still fp32 and becomes int8 in the next step."""
        return sum(
            self._stored(param).numel()
            for group in self.param_groups
            for param in (group["params"] if group["momentum_dtype"] == "int8" else ())
            if param in self.state and "exp_avg_scale" not in self.state[param]
        )

    def _prepare(
        self, group: dict[str, Any], grads: Grads, plan: GroupPlan | None
    ) -> tuple[GroupPlan, StepScalars] | None:
        if self.skip is not None and self._sets_momentum_on_host(group, grads) and bool(self.skip):
            return None
        return super()._prepare(group, grads, plan)

    def _sets_momentum_on_host(self, group: dict[str, Any], grads: Grads) -> bool:
        """Whether this step sets momentum outside of the kernel: to the first gradient, or from fp32 to int8."""
        from_gradient, is_int8 = group["momentum_init"] == "gradient", group.get("momentum_dtype") == "int8"
        if not (from_gradient or is_int8):
            return False
        params = (param for param, grad in zip(group["params"], grads, strict=True) if grad is not None)
        states = list(map(self.state.get, params))
        begins = from_gradient and not all(states)
        return begins or (is_int8 and any(state and "exp_avg_scale" not in state for state in states))

    def _scalars(self, group: dict[str, Any]) -> StepScalars:
        grad_scale = -self.grad_scale if group["maximize"] else self.grad_scale
        return super()._scalars(group)._replace(grad_scale=grad_scale, skip=self.skip)

    def _gradients(self, params: list[Tensor]) -> Grads:
        if not self.use_decoupled_grad:
            return super()._gradients(params)
        return [getattr(param, "decoupled_grad", None) for param in params]

    def _stored(self, param: Tensor) -> Tensor:
        """This rank's local tensor of a DTensor, so that state is plain tensors in any storage precision."""
        return local_tensor(param.detach())

    def _block_layout(self, param: Tensor) -> BlockLayout:
        layout = self.blocks.get(param)
        return BlockLayout.of_whole(self._stored(param)) if layout is None else layout

    def _model_copies(self, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        return [self.model_copies[param] for param in params] if params[0] in self.model_copies else None

    def _digits(self, params: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
        digits = list(map(self.digits.get, params)) if self.digits else []
        return digits if any(present(digits)) else None

    def _telemetry_of(self, param: Tensor) -> Telemetry | None:
        return self.telemetry if self.counted is None or param in self.counted else None

    def _settings(self, group: dict[str, Any]) -> tuple[object, ...]:
        return *super()._settings(group), self.model_copies, self.blocks, self.counted

    def _kind(self, param: Tensor, grad: Tensor, state: State) -> Hashable:
        kind = super()._kind(param, grad, state)
        if self.telemetry is None and not self.model_copies and not self.digits:
            return kind
        model_copy = self.model_copies.get(param)
        copied = None if model_copy is None else model_copy.dtype
        return kind, copied, param in self.digits, self._telemetry_of(param) is not None
