"""Per-parameter optimizer state and its storage precision.

Keys of a parameter's state:

- ``exp_avg``: the momentum, of the parameter's shape. int8 codes if there is an ``exp_avg_scale``.
- ``exp_avg_scale``: bf16, one per block of 32 elements (:func:`megatron_lion.precision.quantize`).
- ``master_param``: only for 16-bit parameters, of the parameter's shape. fp32 master weights, or int16 remainders that
  make an fp32 master together with the bf16 parameter (:func:`megatron_lion.precision.split_master`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import MASTER_WEIGHTS, MOMENTUM_DTYPES, LionError, check_choice
from megatron_lion.precision import BlockLayout, dequantize, join_master, quantize, split_master
from megatron_lion.step import StepKind, StepTensors

# Keys that tell Lion's parameter groups from another optimizer's.
LION_GROUP_KEYS = frozenset({"lr", "betas", "weight_decay", "momentum_init", "maximize"})

State = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Storage:
    """Storage precision of a group's state. None: momentum in the parameter's dtype, no master weights."""

    momentum_dtype: str | None = None
    master_weights: str | None = None

    def __post_init__(self) -> None:
        if self.momentum_dtype is not None:
            check_choice("momentum_dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        if self.master_weights is not None:
            check_choice("master_weights", self.master_weights, MASTER_WEIGHTS)

    def check(self, param: Tensor) -> None:
        """Raise LionError if this storage does not support ``param``."""
        if self.master_weights == "remainder" and param.dtype == torch.float16:
            raise LionError(
                f"master_weights 'remainder' supports only bf16 and fp32 parameters, got {param.dtype} of shape "
                f"{tuple(param.shape)}. Use master_weights='fp32'"
            )
        if self.momentum_dtype == "int8" and hasattr(param, "placements"):
            raise LionError(
                f"momentum_dtype 'int8' does not support DTensor parameters, got one of shape {tuple(param.shape)}: a "
                "local shard may cut a block of 32 elements, which has one scale. Use momentum_dtype='bf16' or 'fp32'"
            )

    def create(self, param: Tensor, layout: BlockLayout) -> State:
        """Return fresh state: zero momentum, and master weights equal to ``param``."""
        dtype = self._momentum(param)
        state: State = {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
        if dtype == torch.int8:
            state["exp_avg_scale"] = param.new_zeros(layout.count(param.numel()), dtype=torch.bfloat16)
        master = self._master(param)
        if master == torch.float32:
            state["master_param"] = param.detach().to(torch.float32, copy=True)
        elif master == torch.int16:
            state["master_param"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
        return state

    def sizes(self, param: Tensor, layout: BlockLayout) -> tuple[int, int]:
        """Bytes of momentum and of master weights that :meth:`create` allocates for ``param``."""
        dtype, master = self._momentum(param), self._master(param)
        scales = 2 * layout.count(param.numel()) if dtype == torch.int8 else 0
        return param.numel() * dtype.itemsize + scales, param.numel() * master.itemsize if master else 0

    def kind(self, param: Tensor, grads: torch.dtype, model_copies: torch.dtype | None = None) -> StepKind:
        """Device and dtypes of a step's tensors for ``param``, as :func:`step_tensors` passes them to a kernel.

        ``grads`` is the dtype of its gradient, ``model_copies`` that of a copy of a parameter without master weights.
        """
        master, momentum = self._master(param), self._momentum(param)
        if master == torch.float32:
            model_copies = param.dtype
        return StepKind(
            param.device,
            masters=torch.float32 if master == torch.float32 else param.dtype,
            grads=grads,
            exp_avgs=momentum,
            model_copies=model_copies,
            remainders=torch.int16 if master == torch.int16 else None,
            scales=torch.bfloat16 if momentum == torch.int8 else None,
        )

    def set_momentum(
        self, state: State, param: Tensor, value: Tensor, layout: BlockLayout, *, exact: bool = False
    ) -> None:
        """Store ``value`` (fp32, as many elements as ``param``) as the momentum, rounded to the storage precision.

        With ``exact``, values that int8 would change stay in fp32, without a scale, until they are set without
        ``exact``. So a loaded momentum that was quantized in other blocks, or not at all, is not rounded before the
        first step.
        """
        value = value.detach().view(param.shape)
        if self._momentum(param) != torch.int8:
            state["exp_avg"].copy_(value)
            return
        codes, scales = quantize(value, layout)
        if exact and not torch.equal(dequantize(codes, scales, layout), value.float()):
            state.pop("exp_avg_scale", None)
            state["exp_avg"] = value.to(param.device, torch.float32, copy=True)
        else:
            state["exp_avg"], state["exp_avg_scale"] = codes.to(param.device), scales.to(param.device)

    def set_master(self, state: State, param: Tensor, value: Tensor) -> None:
        """Store ``value`` (fp32) as the master weights. With remainders this also writes the bf16 parameter."""
        written = self._put_master(state, param, value)
        if written is not None:
            param.data.copy_(written)

    def _put_master(self, state: State, param: Tensor, value: Tensor) -> Tensor | None:
        """As :meth:`set_master`, but return the new value of ``param`` (or None) instead of writing it."""
        value = value.detach().view(param.shape)
        master = self._master(param)
        if master == torch.int16:
            high, state["master_param"] = split_master(value.float().to(param.device))
            return high
        if master == torch.float32:
            state["master_param"] = value.to(param.device, torch.float32, copy=True)
            return None
        return value

    def restore(self, saved: State, param: Tensor, layout: BlockLayout) -> tuple[State, Tensor | None]:
        """Convert ``saved`` to this storage. Return the state and the new value of ``param``, or None to keep it.

        The state has the saved tensors where nothing is converted. Modifies nothing. Raises LionError if ``saved`` has
        no momentum, tensors of other shapes, or master weights that this storage would lose.
        """
        if "exp_avg" not in saved:
            raise LionError(
                f"the state of a parameter of shape {tuple(param.shape)} has no exp_avg, so Lion did not write it; it "
                f"has {', '.join(sorted(saved))}. Load only the weights and start Lion's momentum at zero"
            )
        _check_shapes(saved, param, layout)
        state = {key: value.to(param.device) if torch.is_tensor(value) else value for key, value in saved.items()}
        wanted, master = self._master(param), state.get("master_param")
        if master is not None and wanted is None:
            raise LionError(
                "this state has master weights, which would be lost: build Lion with master_weights='fp32' or "
                "'remainder'"
            )
        written = None
        if wanted is not None and (master is None or master.dtype != wanted):
            written = self._put_master(state, param, master_values(state, param))
        if state["exp_avg"].dtype != self._momentum(param):
            value = momentum_values(state, layout)
            state["exp_avg"] = torch.empty_like(param, dtype=self._momentum(param))
            state.pop("exp_avg_scale", None)
            self.set_momentum(state, param, value, layout, exact=True)
        return state, written

    def _momentum(self, param: Tensor) -> torch.dtype:
        return param.dtype if self.momentum_dtype is None else DTYPES[self.momentum_dtype]

    def _master(self, param: Tensor) -> torch.dtype | None:
        """The dtype of ``master_param``; None if the parameter is its own master."""
        if self.master_weights is None or param.dtype not in (torch.bfloat16, torch.float16):
            return None
        return torch.int16 if self.master_weights == "remainder" else torch.float32


def _check_shapes(saved: State, param: Tensor, layout: BlockLayout) -> None:
    shapes = {"exp_avg": param.shape, "master_param": param.shape}
    shapes["exp_avg_scale"] = torch.Size([layout.count(param.numel())])
    for key, expected in shapes.items():
        if key in saved and saved[key].shape != expected:
            raise LionError(
                f"the saved {key} of a parameter of shape {tuple(param.shape)} has shape {tuple(saved[key].shape)}, "
                f"not {tuple(expected)}: it is another model's, or the parameters are in another order. Nothing was "
                "loaded"
            )


def storage_of(group: dict[str, Any]) -> Storage:
    """The storage of a parameter group's state."""
    return Storage(group.get("momentum_dtype"), group.get("master_weights"))


def momentum_values(state: State, layout: BlockLayout) -> Tensor:
    """The momentum in fp32, or in fp64 if it is stored in fp64. A new tensor only if it is stored in another dtype."""
    exp_avg: Tensor = state["exp_avg"]
    if "exp_avg_scale" in state:
        return dequantize(exp_avg, state["exp_avg_scale"], layout)
    return exp_avg if exp_avg.dtype == torch.float64 else exp_avg.float()


def master_values(state: State, param: Tensor) -> Tensor:
    """The master weights in fp32, or in fp64 for an fp64 parameter. A new tensor only if they are stored otherwise."""
    master = state.get("master_param")
    if master is None:
        return param.detach() if param.dtype == torch.float64 else param.detach().float()
    return join_master(param, master) if master.dtype == torch.int16 else master


def step_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    layout_of: Callable[[Tensor], BlockLayout],
    model_copies: Sequence[Tensor] | None = None,
    digits: Sequence[Tensor] | None = None,
) -> StepTensors:
    """Return the tensors of an update of ``params``. Their states must have the same keys and dtypes.

    ``layout_of`` returns a parameter's block layout; it is called only for quantized momentum. ``model_copies`` are
    for parameters that are masters themselves. Raises ValueError as :class:`~megatron_lion.step.StepTensors` does.
    """
    masters, remainders = list(params), None
    if "master_param" in states[0]:
        stored = [state["master_param"] for state in states]
        if stored[0].dtype == torch.int16:
            remainders = stored
        else:
            masters, model_copies = stored, params
    is_quantized = "exp_avg_scale" in states[0]
    return StepTensors(
        masters=masters,
        grads=list(grads),
        exp_avgs=[state["exp_avg"] for state in states],
        model_copies=None if model_copies is None else list(model_copies),
        remainders=remainders,
        scales=[state["exp_avg_scale"] for state in states] if is_quantized else None,
        blocks=[layout_of(param) for param in params] if is_quantized else None,
        digits=None if digits is None else list(digits),
    )


def restored_states(
    groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    stored: Callable[[Tensor], Tensor],
    layout_of: Callable[[Tensor], BlockLayout],
) -> Iterator[tuple[Tensor, State, Tensor | None]]:
    """Each parameter of ``groups`` with state in ``state_dict``, its state in this storage, and its new value or None.

    ``stored`` returns the tensor that a parameter's state is for. Modifies nothing. Raises LionError if another
    optimizer wrote ``state_dict``, or as :meth:`Storage.restore` does.
    """
    for group in state_dict["param_groups"]:
        if missing := sorted(LION_GROUP_KEYS - group.keys()):
            raise LionError(
                f"this optimizer state was not written by Lion: its parameter groups lack {', '.join(missing)} and "
                f"have {', '.join(sorted(group.keys() - {'params'}))}. Load only the weights and start Lion's momentum "
                "at zero (in Megatron: --no-load-optim)"
            )
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=False):
        for param, number in zip(group["params"], saved_group["params"], strict=False):
            if saved := state_dict["state"].get(number):
                yield param, *storage_of(group).restore(saved, stored(param), layout_of(param))
