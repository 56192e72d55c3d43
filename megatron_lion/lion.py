"""Lion as an ordinary ``torch.optim.Optimizer``."""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_lion import kernels
from megatron_lion.config import MOMENTUM_INITS, PAPER_BETAS, LionError, check_betas, check_choice, check_non_negative
from megatron_lion.precision import Place
from megatron_lion.rows import Row, columns, row_of
from megatron_lion.storage import Storage, master_values, momentum_values
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import compute_dtype

# What tells Lion's parameter groups from another optimizer's.
LION_GROUP_KEYS = frozenset({"lr", "betas", "weight_decay", "momentum_init", "maximize"})
# Matters of this run, which loading a state does not change.
KEPT_ON_LOAD = ("kernel", "momentum_dtype", "master_weights")


class Lion(torch.optim.Optimizer):
    """Lion (evolved sign momentum), Algorithm 1 of Dong, Li, Lin (2025) after Chen et al. (2023), arXiv 2302.06675::

        c_k         = beta1 * m_{k-1} + (1 - beta1) * g_k
        theta_{k+1} = theta_k - lr * (sign(c_k) + weight_decay * theta_k)
        m_k         = beta2 * m_{k-1} + (1 - beta2) * g_k

    ``sign(0) = 0``; weight decay is decoupled and acts on the old theta. The rounding is fixed, see
    :mod:`megatron_lion.update`, so the step on a shard of a tensor equals the step on the whole bit for bit.

    State, per parameter: ``exp_avg`` (m), of the parameter's shape, and what :mod:`megatron_lion.storage` adds in other
    precisions. Issues no collective.

    Args:
        params: parameters or parameter groups; each group may have its own ``lr``, ``betas``, ``weight_decay``,
            ``momentum_init`` and ``maximize``.
        lr: step size, >= 0. 3 to 10 times lower than AdamW's. Like weight_decay it may be a one-element tensor, which
            the Triton kernel reads on the device: a captured CUDA graph follows what is written to it later.
        betas: (beta1, beta2), each in [0, 1). For language models the paper uses (0.9, 0.95).
        weight_decay: decoupled weight decay lambda, >= 0.
        momentum_init: ``"zero"`` starts from m_0 = 0, as practice does; ``"gradient"`` from m_0 = g_1, as the
            convergence proof does (Lemma 6), so that the first step is along sign(g_1).
        maximize: ascend instead of descend.
        kernel: ``"auto"``, ``"reference"``, ``"foreach"`` or ``"fused"``; all give the same bits. Fused is one
            pass over memory, on the CPU so far; auto takes it where it can.
        momentum_dtype: ``"fp32"``, ``"bf16"`` or ``"int8"`` (with a bf16 scale for each 32 elements); None for the
            parameter's own dtype. The arithmetic is fp32 in each.
        master_weights: for 16-bit parameters: ``"fp32"`` copies, or ``"remainder"``, 16 bits that make an fp32 master
            of a bf16 parameter, which then rounds half away from zero; None to round each step to the parameter's
            dtype.

    Raises:
        LionError: for a hyperparameter out of range, a complex or integer parameter, a sparse gradient, or a state
            dict that another optimizer wrote.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Lion(layer.parameters(), lr=1e-4, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
    """

    # For whoever drives the step from outside, as Megatron's distributed optimizer does: a factor on every gradient,
    # a one-element int32 tensor that leaves everything as it is where it is not 0 (read on the host if momentum begins
    # with this gradient or becomes int8 in this step), 16-bit copies of parameters, by parameter, that the step writes
    # too, where in its parameter each shard lies, whether gradients are in ``decoupled_grad``, which may have another
    # dtype than the parameter, what each step's sums are added to, and for which parameters (None: all). Class
    # attributes, so that an unpickled optimizer, which keeps groups and state alone, has them.
    grad_scale: float | Tensor = 1.0
    skip: Tensor | None = None
    copies: Mapping[Tensor, Tensor] = MappingProxyType({})
    places: Mapping[Tensor, Place] = MappingProxyType({})
    use_decoupled_grad: bool = False
    telemetry: Telemetry | None = None
    counted: Collection[Tensor] | None = None

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
        """Add a group of parameters, with the defaults for what it leaves out; nothing is added if a check fails."""
        group = {**self.defaults, **param_group}
        group["betas"] = check_betas(group["betas"])
        for key in ("lr", "weight_decay"):
            if not torch.is_tensor(group[key]):  # a learning rate in a tensor is read at each step
                group[key] = check_non_negative(key, group[key])
        check_choice("momentum_init", group["momentum_init"], MOMENTUM_INITS)
        check_choice("kernel", group["kernel"], kernels.KERNELS)
        storage = _storage(group)
        params = group["params"]
        group["params"] = [params] if torch.is_tensor(params) else list(params)
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry  # torch takes (name, parameter) too
            if torch.is_tensor(param) and not param.is_floating_point():
                raise LionError(
                    f"Lion needs real floating-point parameters, got {param.dtype} of shape {tuple(param.shape)}"
                )
            if torch.is_tensor(param):
                storage.check(param)
        super().add_param_group(group)

    def init_state(self) -> None:
        """Give every parameter that has no state yet m = 0, as loading a checkpoint into fresh state needs."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of momentum, and of master weights, that the state of all parameters takes or will take."""
        sizes = [
            _storage(group).sizes(param, self._place(param)) for group in self.param_groups for param in group["params"]
        ]
        return sum(momentum for momentum, _ in sizes), sum(master for _, master in sizes)

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """``exp_avg`` or ``master_param`` of ``param`` in fp32, rebuilt from however it is stored.

        With :meth:`set_scaled_state` the interface that Megatron's precision-aware optimizer has with Transformer
        Engine's FusedAdam. The tensor is a new one unless it is stored as it is.
        """
        if name == "exp_avg":
            return momentum_values(self.state[param], self._place(param))
        check_choice("state", name, ("exp_avg", "master_param"))
        return master_values(self.state[param], param)

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Store fp32 ``value`` as ``exp_avg`` or ``master_param`` of ``param``, which must have state.

        Momentum that int8 would change stays in fp32 until the first step. Where remainders are stored, setting
        ``master_param`` writes the bf16 parameter as well.
        """
        storage = _storage(
            next(group for group in self.param_groups if any(param is other for other in group["params"]))
        )
        if name == "exp_avg":
            storage.set_momentum(self.state[param], param, value, self._place(param), exact=True)
        else:
            check_choice("state", name, ("exp_avg", "master_param"))
            storage.set_master(self.state[param], param, value)

    def unquantised(self) -> int:
        """How many elements have momentum that is to be int8 and waits in fp32 for the next step."""
        return sum(
            param.numel()
            for group in self.param_groups
            for param in (group["params"] if group["momentum_dtype"] == "int8" else ())
            if param in self.state and "exp_avg_scale" not in self.state[param]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place; gradients are left as they are.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # before anything is updated
            for param in group["params"]:
                if (grad := param.grad) is not None and grad.is_sparse:
                    raise LionError(
                        f"Lion does not take sparse gradients (parameter of shape {tuple(param.shape)}): "
                        "build the embedding with sparse=False. Nothing was updated"
                    )
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        if self.skip is not None and self._writes_state_on_host(group) and bool(self.skip):
            return
        rows: dict[Any, list[Row]] = {}
        for param in group["params"]:
            if (grad := self._gradient(param)) is not None:
                row = self._row(param, -grad if group["maximize"] else grad, group)
                kind = (*row.kind(), self.telemetry is not None and self._is_counted(row))
                rows.setdefault(kind, []).append(row)
        for alike in rows.values():
            self._update(group, alike)
        if group.get("momentum_dtype") == "int8":
            storage = _storage(group)
            for row in (row for alike in rows.values() for row in alike if row.scale is None):  # it waited in fp32
                storage.set_momentum(self.state[row.param], row.param, row.exp_avg, self._place(row.param))

    def _writes_state_on_host(self, group: dict[str, Any]) -> bool:
        """Whether this step sets momentum outside the kernel: to the first gradient, or from fp32 to int8."""
        states = [self.state.get(param) for param in group["params"] if self._gradient(param) is not None]
        begins = group["momentum_init"] == "gradient" and not all(states)
        waits = group.get("momentum_dtype") == "int8" and any(
            state and "exp_avg_scale" not in state for state in states
        )
        return begins or waits

    def _is_counted(self, row: Row) -> bool:
        return self.counted is None or row.param in self.counted

    def _gradient(self, param: Tensor) -> Tensor | None:
        return getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad

    def _place(self, param: Tensor) -> Place:
        return self.places.get(param) or Place.of_whole(param)

    def _state_of(self, param: Tensor, group: dict[str, Any], grad: Tensor | None = None) -> dict[str, Any]:
        """The state of ``param``. If there is none it is made, with momentum zero or ``grad``, as the group asks."""
        state: dict[str, Any] = self.state[param]
        if not state:
            storage, place = _storage(group), self._place(param)
            state = self.state[param] = storage.create(param, place)
            if grad is not None and group["momentum_init"] == "gradient":
                storage.set_momentum(state, param, grad.to(compute_dtype(param)) * self.grad_scale, place)
        return state

    def _row(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Row:
        state = self._state_of(param, group, grad)
        place = self._place(param) if "exp_avg_scale" in state else None
        return row_of(param, grad, state, self.copies.get(param) if self.copies else None, place)

    def _update(self, group: dict[str, Any], rows: list[Row]) -> None:
        tensors = columns(rows)
        packed = tensors["remainders"] is not None or tensors["scales"] is not None
        choice = (tensors["params"], tensors["grads"], tensors["exp_avgs"])
        update = kernels.choose(group.get("kernel", "auto"), *choice, packed=packed)
        hyper: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay")} | {"grad_scale": self.grad_scale}
        if kernels.reads_on_device(update):
            hyper["skip"] = self.skip
        elif self.skip is not None and bool(self.skip):
            return
        else:
            hyper = {key: float(value) for key, value in hyper.items()}
        update(
            **tensors,
            **hyper,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            telemetry=self.telemetry if self._is_counted(rows[0]) else None,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` returned: the next steps equal, bit for bit, those of an optimizer never saved.

        A state in another precision is converted to this optimizer's. Hooks see and may change the saved state before
        the load and this optimizer's state after it. Raises LionError, changing nothing, if the state is another
        optimizer's or has master weights that this one would lose.
        """
        restored: list[tuple[Tensor, dict[str, Any], Tensor | None]] = []
        kept: list[dict[str, Any]] = []

        def convert(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            kept.extend({key: group.get(key) for key in KEPT_ON_LOAD} for group in self.param_groups)
            restored.extend(self._restored(state_dict))
            return {**state_dict, "state": {}}  # torch would cast the state to the parameters' dtype

        def install(_: torch.optim.Optimizer) -> None:
            for group, keep in zip(self.param_groups, kept, strict=True):
                group.update(keep)
            for param, state, written in restored:
                self.state[param] = state
                if written is not None:
                    param.data.copy_(written)

        # After everyone's pre-hooks and before everyone's post-hooks; between the two torch checks the groups' sizes.
        own = (
            self.register_load_state_dict_pre_hook(convert),
            self.register_load_state_dict_post_hook(install, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in own:
                hook.remove()

    def _restored(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any], Tensor | None]]:
        """Each parameter that has state in ``state_dict``, its state in this storage, and its own new value or None."""
        for group in state_dict["param_groups"]:
            missing = sorted(LION_GROUP_KEYS - group.keys())
            if missing:
                raise LionError(
                    f"this optimizer state was not written by Lion: its parameter groups lack {', '.join(missing)} and "
                    f"have {', '.join(sorted(group.keys() - {'params'}))}. Load the weights alone and start Lion's "
                    "momentum at zero (in Megatron: --no-load-optim)"
                )
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, number in zip(group["params"], saved_group["params"], strict=False):
                if saved := state_dict["state"].get(number):
                    yield param, *_storage(group).restore(saved, param, self._place(param))


def _storage(group: dict[str, Any]) -> Storage:
    return Storage(group.get("momentum_dtype"), group.get("master_weights"))
