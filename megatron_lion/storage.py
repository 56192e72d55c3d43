"""What Lion keeps for one parameter, in the precision that was asked for, and its values in fp32.

Keys of a parameter's state:

- ``exp_avg``: the momentum, of the parameter's shape. int8 codes where ``exp_avg_scale`` is there too.
- ``exp_avg_scale``: bf16, one for each block of 32 elements (:func:`megatron_lion.precision.quantise`).
- ``master_param``: of a 16-bit parameter's shape: its fp32 master weights, or the int16 remainders that make an fp32
  master together with the bf16 parameter (:func:`megatron_lion.precision.split_master`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import MASTER_WEIGHTS, MOMENTUM_DTYPES, LionError, check_choice
from megatron_lion.precision import Place, dequantise, join_master, quantise, split_master

State = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Storage:
    """How the state of a group of parameters is kept. None: momentum in the parameter's dtype, no master weights."""

    momentum_dtype: str | None = None
    master_weights: str | None = None

    def __post_init__(self) -> None:
        if self.momentum_dtype is not None:
            check_choice("momentum_dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        if self.master_weights is not None:
            check_choice("master_weights", self.master_weights, MASTER_WEIGHTS)

    def check(self, param: Tensor) -> None:
        """Raise LionError where ``param`` cannot be kept so."""
        if self.master_weights == "remainder" and param.dtype == torch.float16:
            raise LionError(
                f"master_weights 'remainder' makes an fp32 master of a bf16 parameter; this one is {param.dtype} of "
                f"shape {tuple(param.shape)}. Use master_weights='fp32'"
            )

    def create(self, param: Tensor, place: Place) -> State:
        """Fresh state: momentum zero, and master weights equal to ``param``."""
        dtype = self._momentum(param)
        state: State = {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
        if dtype == torch.int8:
            state["exp_avg_scale"] = param.new_zeros(place.blocks(param.numel()), dtype=torch.bfloat16)
        master = self._master(param)
        if master == torch.float32:
            state["master_param"] = param.detach().to(torch.float32, copy=True)
        elif master == torch.int16:
            state["master_param"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
        return state

    def sizes(self, param: Tensor, place: Place) -> tuple[int, int]:
        """Bytes of momentum and of master weights that :meth:`create` makes for ``param``."""
        dtype, master = self._momentum(param), self._master(param)
        scales = 2 * place.blocks(param.numel()) if dtype == torch.int8 else 0
        return param.numel() * dtype.itemsize + scales, param.numel() * master.itemsize if master else 0

    def set_momentum(self, state: State, param: Tensor, value: Tensor, place: Place, *, exact: bool = False) -> None:
        """Store ``value`` (fp32, of as many elements as ``param``) as the momentum, rounded to the storage.

        With ``exact``, values that int8 would change stay in fp32, without a scale, until they are set without it: so a
        momentum that was quantised in other blocks, or not at all, is not rounded before the first step.
        """
        value = value.detach().view(param.shape)
        if self._momentum(param) != torch.int8:
            state["exp_avg"].copy_(value)
            return
        codes, scales = quantise(value, place)
        if exact and not torch.equal(dequantise(codes, scales, place), value.float()):
            state.pop("exp_avg_scale", None)
            state["exp_avg"] = value.to(param.device, torch.float32, copy=True)
        else:
            state["exp_avg"], state["exp_avg_scale"] = codes.to(param.device), scales.to(param.device)

    def set_master(self, state: State, param: Tensor, value: Tensor) -> None:
        """Store ``value`` (fp32) as the master weights; a bf16 parameter that is half of them is written too."""
        written = self._put_master(state, param, value)
        if written is not None:
            param.data.copy_(written)

    def _put_master(self, state: State, param: Tensor, value: Tensor) -> Tensor | None:
        """As :meth:`set_master`, but return the new value of ``param``, or None, instead of writing it."""
        value = value.detach().view(param.shape)
        master = self._master(param)
        if master == torch.int16:
            high, state["master_param"] = split_master(value.float().to(param.device))
            return high
        if master == torch.float32:
            state["master_param"] = value.to(param.device, torch.float32, copy=True)
            return None
        return value

    def restore(self, saved: State, param: Tensor, place: Place) -> tuple[State, Tensor | None]:
        """``saved`` in this storage, with the same tensors if nothing is converted, and the new value of ``param``.

        That value is None if ``param`` keeps its own. Modifies nothing. Raises LionError if ``saved`` has no momentum,
        or master weights and this storage has none.
        """
        if "exp_avg" not in saved:
            raise LionError(
                f"the state of a parameter of shape {tuple(param.shape)} has no exp_avg, so Lion did not write it; it "
                f"has {', '.join(sorted(saved))}. Load the weights alone and start Lion's momentum at zero"
            )
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
            value = momentum_values(state, place)
            state["exp_avg"] = torch.empty_like(param, dtype=self._momentum(param))
            state.pop("exp_avg_scale", None)
            self.set_momentum(state, param, value, place, exact=True)
        return state, written

    def _momentum(self, param: Tensor) -> torch.dtype:
        return param.dtype if self.momentum_dtype is None else DTYPES[self.momentum_dtype]

    def _master(self, param: Tensor) -> torch.dtype | None:
        """The dtype of ``master_param``; None where the parameter is its own master."""
        if self.master_weights is None or param.dtype not in (torch.bfloat16, torch.float16):
            return None
        return torch.int16 if self.master_weights == "remainder" else torch.float32


def momentum_values(state: State, place: Place) -> Tensor:
    """The momentum in fp32, or in fp64 where it is stored so; a new tensor unless it is stored as it is."""
    exp_avg: Tensor = state["exp_avg"]
    if "exp_avg_scale" in state:
        return dequantise(exp_avg, state["exp_avg_scale"], place)
    return exp_avg if exp_avg.dtype == torch.float64 else exp_avg.float()


def master_values(state: State, param: Tensor) -> Tensor:
    """The master weights in fp32, or in fp64 where the parameter is; a new tensor unless they are stored so."""
    master = state.get("master_param")
    if master is None:
        return param.detach() if param.dtype == torch.float64 else param.detach().float()
    return join_master(param, master) if master.dtype == torch.int16 else master
