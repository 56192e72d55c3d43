"""Lion as an ordinary ``torch.optim.Optimizer``."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_lion import kernels
from megatron_lion.config import MOMENTUM_INITS, PAPER_BETAS, LionError, check_betas, check_choice, check_non_negative
from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepScalars
from megatron_lion.storage import State, restored_states, step_tensors, storage_of
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import compute_dtype

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
    tensors of other precisions. Issues no collective.

    Args:
        params: parameters or parameter groups; each group may have its own ``lr``, ``betas``, ``weight_decay``,
            ``momentum_init`` and ``maximize``.
        lr: step size, >= 0, usually 3 to 10 times lower than AdamW's. ``lr`` and ``weight_decay`` may be one-element
            tensors. The Triton kernel reads them on the device, so a captured CUDA graph follows later writes to them.
        betas: (beta1, beta2), each in [0, 1). For language models the paper uses (0.9, 0.95).
        weight_decay: decoupled weight decay lambda, >= 0.
        momentum_init: ``"zero"`` starts from m_0 = 0, as is usual; ``"gradient"`` from m_0 = g_1, as in the
            convergence proof (Lemma 6), so that the first step is along sign(g_1).
        maximize: ascend instead of descend.
        kernel: ``"auto"``, ``"reference"``, ``"foreach"`` or ``"fused"``; all give the same bits. Fused makes one
            pass over memory. See :func:`megatron_lion.kernels.choose` for what auto selects.
        momentum_dtype: ``"fp32"``, ``"bf16"`` or ``"int8"`` (with one bf16 scale per 32 elements); None for the
            parameter's dtype. The arithmetic is fp32 for each of them.
        master_weights: for 16-bit parameters. ``"fp32"``: fp32 copies. ``"remainder"``: 16 bits that make an fp32
            master together with a bf16 parameter, which then rounds half away from zero. None: no masters; each step
            is rounded to the parameter's dtype.

    Attributes:
        telemetry: each step adds its sums to this :class:`~megatron_lion.telemetry.Telemetry`; None (the default) for
            no sums.

    Raises:
        LionError: a hyperparameter is out of range, a parameter is complex or integer, a gradient is sparse, or
            another optimizer wrote the state dict.

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
        betas: tuple[float, float] = PAPER_BETAS,
        weight_decay: float = 0.0,
        *,
        momentum_init: str = "zero",
        maximize: bool = False,
        kernel: str = "auto",
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
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Missing settings get the defaults. Nothing is added if a check fails."""
        group = {**self.defaults, **param_group}
        group["betas"] = check_betas(group["betas"])
        for key in ("lr", "weight_decay"):
            if not torch.is_tensor(group[key]):  # a tensor is read at each step
                group[key] = check_non_negative(key, group[key])
        check_choice("momentum_init", group["momentum_init"], MOMENTUM_INITS)
        check_choice("kernel", group["kernel"], kernels.KERNELS)
        storage = storage_of(group)
        params = group["params"]
        group["params"] = [params] if torch.is_tensor(params) else list(params)
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry  # torch also accepts (name, parameter)
            if torch.is_tensor(param) and not param.is_floating_point():
                raise LionError(
                    f"Lion needs real floating-point parameters, got {param.dtype} of shape {tuple(param.shape)}"
                )
            if torch.is_tensor(param):
                storage.check(param)
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
        for group in self.param_groups:  # before anything is updated
            for param in group["params"]:
                if (grad := param.grad) is not None and grad.is_sparse:
                    raise LionError(
                        f"Lion does not support sparse gradients (parameter of shape {tuple(param.shape)}). Nothing "
                        "was updated. Build the embedding with sparse=False"
                    )
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        scalars = self._scalars(group)
        by_kind: defaultdict[Hashable, list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
        for param in group["params"]:
            if (grad := self._gradient(param)) is not None:
                grad = -grad if group["maximize"] else grad
                state = self.state[param] or self._begin(param, grad, group, scalars)
                by_kind[self._kind(param, grad, state)].append((param, grad, state))
        for entries in by_kind.values():
            self._update(group, scalars, *zip(*entries, strict=True))

    def _update(
        self,
        group: dict[str, Any],
        scalars: StepScalars,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """Update parameters of one kind."""
        written = self._model_copies(params), self._digits(params)
        tensors = step_tensors(params, grads, states, self._block_layout, *written)
        assert tensors.kind is not None  # there are tensors
        has_digits = tensors.digits is not None
        update = kernels.choose(group.get("kernel", "auto"), tensors.kind, digits=has_digits)
        update(tensors, scalars, self._telemetry_of(params[0]))
        if group.get("momentum_dtype") == "int8" and tensors.scales is None:  # loaded in fp32, see set_momentum
            storage = storage_of(group)
            for param, state in zip(params, states, strict=True):
                storage.set_momentum(state, param, state["exp_avg"], self._block_layout(param))

    def _begin(self, param: Tensor, grad: Tensor, group: dict[str, Any], scalars: StepScalars) -> State:
        """Create the state of ``param`` before its first step."""
        state: State = self._create_state(param, group)
        if group["momentum_init"] == "gradient":
            first = grad.to(compute_dtype(param)) * scalars.grad_scale
            storage_of(group).set_momentum(state, param, first, self._block_layout(param))
        return state

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> State:
        self.state[param] = storage_of(group).create(param, self._block_layout(param))
        return self.state[param]

    # What a subclass may change.

    def _scalars(self, group: dict[str, Any]) -> StepScalars:
        beta1, beta2 = group["betas"]
        return StepScalars(group["lr"], beta1, beta2, group["weight_decay"])

    def _gradient(self, param: Tensor) -> Tensor | None:
        return param.grad

    def _block_layout(self, param: Tensor) -> BlockLayout:
        return BlockLayout.of_whole(param)

    def _model_copies(self, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Tensors that the step writes in addition to ``params``, which are of one kind."""
        return None

    def _digits(self, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Tensors in which the step leaves what other ranks need to repeat it."""
        return None

    def _telemetry_of(self, param: Tensor) -> Telemetry | None:
        return self.telemetry

    def _kind(self, param: Tensor, grad: Tensor, state: State) -> Hashable:
        """Equal for parameters that one call of a kernel can update."""
        master = state.get("master_param")
        stored = None if master is None else master.dtype
        return param.dtype, param.device, grad.dtype, state["exp_avg"].dtype, stored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of ``state_dict()``. The next steps are bit-identical to those of the saved optimizer.

        A state in another precision is converted to this optimizer's. Load hooks see, and may change, the saved state
        before the load and this optimizer's state after it. Raises LionError, changing nothing, if another optimizer
        wrote the state or if it has master weights that this one would lose.
        """
        restored: list[tuple[Tensor, State, Tensor | None]] = []
        kept: list[dict[str, Any]] = []

        def convert(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            kept.extend({key: group.get(key) for key in KEPT_ON_LOAD} for group in self.param_groups)
            restored.extend(restored_states(self.param_groups, state_dict, self._block_layout))
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
