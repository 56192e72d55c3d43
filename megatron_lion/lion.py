"""Lion as an ordinary ``torch.optim.Optimizer``."""

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_lion import kernels, param_groups
from megatron_lion.config import CHEN_BETAS, LionError, LionOptions
from megatron_lion.plan import GroupPlan, KernelCall, present
from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepScalars
from megatron_lion.storage import State, restored_states, step_tensors, storage_of
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import compute_dtype

Grads = list[Tensor | None]
_grad = operator.attrgetter("grad")

# Settings of this run, which loading a state does not change.
KEPT_ON_LOAD = ("kernel", "momentum_dtype", "master_weights")


class Lion(torch.optim.Optimizer):
    """Lion (evolved sign momentum), Algorithm 1 of Dong, Li, Lin (2025) after Chen et al. (2023), arXiv 2302.06675::

        c_k         = beta1 * m_{k-1} + (1 - beta1) * g_k
        theta_{k+1} = theta_k - lr * (sign(c_k) + weight_decay * theta_k)
        m_k         = beta2 * m_{k-1} + (1 - beta2) * g_k

    ``sign(0) = 0``; weight decay is decoupled and acts on the old theta. The rounding is fixed (see
    :mod:`megatron_lion.update`), so a step on a shard of a tensor is bit-identical to a step on the whole tensor.

    State per parameter: ``exp_avg`` (m), of the parameter's shape; :mod:`megatron_lion.storage` lists the additional
    tensors of other precisions. Issues no collective, except for a DTensor gradient with other placements than its
    parameter, which is redistributed.

    A NaN or infinity in a gradient stays in ``exp_avg``: sign(NaN) counts as 0, so that element no longer learns, and
    the loss does not show it. Check gradients before the step. Megatron's loop does.

    DTensor parameters (torch FSDP2, Megatron-FSDP) are stepped on each rank's local tensors, with state in DTensors of
    the same placements. ``telemetry`` then has the sums of the local tensors.

    Args:
        params: parameters or parameter groups; each group may have its own ``lr``, ``betas``, ``weight_decay``,
            ``momentum_init`` and ``maximize``.
        lr: step size, >= 0, usually 3 to 10 times lower than AdamW's. ``lr`` and ``weight_decay`` may be one-element
            tensors. The Triton kernel reads them on the device, so a captured CUDA graph follows later writes to them.
        betas: (beta1, beta2), each in [0, 1); by default (0.9, 0.99), as Chen et al. (2023). For language models Dong,
            Li and Lin (2025) use (0.9, 0.95).
        weight_decay: decoupled weight decay lambda, >= 0.
        momentum_init: ``"zero"`` starts from m_0 = 0, as is usual; ``"gradient"`` from m_0 = g_1, as in the
            convergence proof (Lemma 6), so that the first step is along sign(g_1).
        maximize: ascend instead of descend.
        kernel: ``"auto"`` (the default), ``"reference"``, ``"foreach"`` or ``"fused"``; all give the same bits. Fused
            makes one pass over memory. See :func:`megatron_lion.kernels.choose` for what auto selects.
        momentum_dtype: ``"fp32"``, ``"bf16"`` or ``"int8"`` (with one bf16 scale per 32 elements); None for the
            parameter's dtype. The arithmetic is fp32 for each of them.
        master_weights: for 16-bit parameters. ``"fp32"``: fp32 copies. ``"remainder"``: 16 bits that make an fp32
            master together with a bf16 parameter, which then rounds half away from zero. None: no masters; each step
            is rounded to the parameter's dtype.

    Attributes:
        telemetry: each step adds its sums to this :class:`~megatron_lion.telemetry.Telemetry`; None (the default) for
            no sums.

    Raises:
        LionError: a hyperparameter is out of range, a parameter is complex or integer, ``kernel="fused"`` does not
            support a parameter, a gradient is sparse, or a state dict is another optimizer's or of other shapes.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Lion(layer.parameters(), lr=1e-4, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
    """

    telemetry: Telemetry | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = CHEN_BETAS,
        weight_decay: float = 0.0,
        *,
        momentum_init: str = "zero",
        maximize: bool = False,
        kernel: str = LionOptions.kernel,
        momentum_dtype: str | None = None,
        master_weights: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "momentum_init": momentum_init,
            "maximize": maximize,
            "kernel": kernel,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
        }
        param_groups.refuse_set(params)
        self._forget_plans()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict`` and by pickle."""
        super().__setstate__(state)
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._plans: dict[int, GroupPlan] = {}
        self._captured: list[object] = self.__dict__.get("_captured", [])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Missing settings get the defaults. Nothing is added if a check fails."""
        group = param_groups.completed(param_group, self.defaults)
        storage = storage_of(group)
        for param in param_groups.tensors_of(group):
            storage.check(self._stored(param))
            kernels.check_parameter(group["kernel"], storage.kind(param, param.dtype), param)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place. Gradients are not modified.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The result of ``closure``, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What can fail comes before the first update: a step is made as a whole or not at all.
        ready = [(group, *self._ready(group)) for group in self.param_groups]
        for group, prepared in [(group, self._prepare(group, grads, plan)) for group, grads, plan in ready]:
            if prepared is not None:
                self._run(group, *prepared)
        return loss

    def _ready(self, group: dict[str, Any]) -> tuple[Grads, GroupPlan | None]:
        """The group's gradients, and the plan of its last step if that still holds. Changes nothing."""
        params = group["params"]
        grads = self._gradients(params)
        plan = self._plans.get(id(group))
        if plan is not None and plan.take(self._settings(group), params, grads, self.state, self._digits):
            return grads, plan
        for param, grad in zip(params, grads, strict=True):
            if grad is not None and grad.is_sparse:
                raise LionError(
                    f"Lion does not support sparse gradients (parameter of shape {tuple(param.shape)}). Nothing was "
                    "updated. Build the embedding with sparse=False"
                )
        return grads, None

    def _prepare(
        self, group: dict[str, Any], grads: Grads, plan: GroupPlan | None
    ) -> tuple[GroupPlan, StepScalars] | None:
        """The plan and the scalars of the group's step, or None for no step. Creates missing state."""
        scalars = self._scalars(group)
        return plan or self._plan(group, grads, scalars), scalars

    def _run(self, group: dict[str, Any], plan: GroupPlan, scalars: StepScalars) -> None:
        for call in plan.calls:
            call.run(scalars, self._telemetry_of(call.params[0]))
            if group.get("momentum_dtype") == "int8" and call.tensors.scales is None:  # loaded in fp32, set_momentum
                storage = storage_of(group)
                for param, state in zip(call.params, call.states, strict=True):
                    storage.set_momentum(state, self._stored(param), state["exp_avg"], self._block_layout(param))
            if call.tensors.are_captured():  # a graph reads a kernel's tables at each replay
                self._captured.append(call.tensors.launch)

    def _plan(self, group: dict[str, Any], grads: Grads, scalars: StepScalars) -> GroupPlan:
        """Divide the parameters that have a gradient into calls of kernels. Creates missing state.

        With DTensor parameters a plan holds for one step only, because their gradients have other addresses than the
        local tensors that kernels see.
        """
        grads = [
            None if grad is None else _placed_as(param, grad)
            for param, grad in zip(group["params"], grads, strict=True)
        ]
        by_kind: defaultdict[Hashable, list[int]] = defaultdict(list)
        for index, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            if grad is not None:
                state = self.state[param] or self._begin(param, grad, group, scalars)
                by_kind[self._kind(param, grad, state)].append(index)
        calls = [self._call(group, grads, indices) for indices in by_kind.values()]
        states = list(self.state.values())
        plan = GroupPlan(self._settings(group), list(group["params"]), present(grads), states, calls)
        if previous := self._plans.get(id(group)):
            plan.inherit(previous)
        self._plans[id(group)] = plan
        return plan

    def _call(self, group: dict[str, Any], grads: Grads, indices: list[int]) -> KernelCall:
        """The call that updates the parameters at ``indices``, which are of one kind."""
        params = [group["params"][index] for index in indices]
        states = [self.state[param] for param in params]
        grads_here = [grad for index in indices if (grad := grads[index]) is not None]
        digits = cast(Sequence[Tensor] | None, self._digits(params))  # of all or of none, as they are of one kind
        tensors = step_tensors(params, grads_here, states, self._block_layout, self._model_copies(params), digits)
        assert tensors.kind is not None  # there are tensors
        kernel = group.get("kernel", LionOptions.kernel)
        update = kernels.choose(kernel, tensors.kind, digits=tensors.digits is not None)
        chosen = set(indices)
        return KernelCall(update, tensors, params, states, [index in chosen for index in range(len(grads))])

    def _begin(self, param: Tensor, grad: Tensor, group: dict[str, Any], scalars: StepScalars) -> State:
        """Create the state of ``param`` before its first step."""
        state: State = self._create_state(param, group)
        if group["momentum_init"] == "gradient":
            first = grad.to(compute_dtype(param)) * scalars.grad_scale
            storage_of(group).set_momentum(state, self._stored(param), first, self._block_layout(param))
        return state

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> State:
        self.state[param] = storage_of(group).create(self._stored(param), self._block_layout(param))
        return self.state[param]

    # What a subclass may change.

    def _scalars(self, group: dict[str, Any]) -> StepScalars:
        beta1, beta2 = group["betas"]
        return StepScalars(group["lr"], beta1, beta2, group["weight_decay"], -1.0 if group["maximize"] else 1.0)

    def _gradients(self, params: list[Tensor]) -> Grads:
        return list(map(_grad, params))

    def _stored(self, param: Tensor) -> Tensor:
        """The tensor that the state of ``param`` is for."""
        return param

    def _block_layout(self, param: Tensor) -> BlockLayout:
        return BlockLayout.of_whole(param)

    def _model_copies(self, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Tensors that the step writes in addition to ``params``, which are of one kind."""
        return None

    def _digits(self, params: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
        """For each of ``params``: a tensor in which the step leaves what other ranks need to repeat it, or None. None
        if there are none."""
        return None

    def _telemetry_of(self, param: Tensor) -> Telemetry | None:
        return self.telemetry

    def _settings(self, group: dict[str, Any]) -> tuple[object, ...]:
        """Objects other than tensors and state on which the calls of a group's step depend, compared by identity."""
        return group.get("kernel"), group.get("momentum_dtype"), self.telemetry is None

    def _kind(self, param: Tensor, grad: Tensor, state: State) -> Hashable:
        """Equal for parameters that one call of a kernel can update."""
        master = state.get("master_param")
        stored = None if master is None else master.dtype
        return param.dtype, param.device, grad.dtype, state["exp_avg"].dtype, stored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of ``state_dict()``. The next steps are bit-identical to those of the saved optimizer.

        A state in another precision is converted to this optimizer's. **Load the model's weights first**: masters in
        another format, or missing ones, are made from the parameters. Load hooks see, and may change, the saved state
        before the load and this optimizer's state after it. Raises LionError, changing nothing, if another optimizer
        wrote the state, if it is of other shapes, or if it has master weights that this one would lose.
        """
        restored: list[tuple[Tensor, State, Tensor | None]] = []
        kept: list[dict[str, Any]] = []

        def convert(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            kept.extend({key: group.get(key) for key in KEPT_ON_LOAD} for group in self.param_groups)
            restored.extend(restored_states(self.param_groups, state_dict, self._stored, self._block_layout))
            return {**state_dict, "state": {}}  # torch would cast the state to the parameters' dtype

        def install(_: torch.optim.Optimizer) -> None:
            for group, keep in zip(self.param_groups, kept, strict=True):
                group.update(keep)
            for param, state, written in restored:
                self.state[param] = state
                if written is not None:
                    param.data.copy_(written)

        # After all other pre-hooks and before all other post-hooks. Between the two, torch checks the groups' sizes.
        own = (
            self.register_load_state_dict_pre_hook(convert),
            self.register_load_state_dict_post_hook(install, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in own:
                hook.remove()


def _placed_as(param: Tensor, grad: Any) -> Tensor:
    """``grad`` with the placements of ``param`` if it is a DTensor with others, such as a sum that is still pending.

    Issues the collective of that redistribution, on every rank of the mesh. Others are returned as they are.
    """
    placements = getattr(param, "placements", None)
    if placements is None or getattr(grad, "placements", placements) == placements:
        return cast(Tensor, grad)
    return cast(Tensor, grad.redistribute(placements=placements))
