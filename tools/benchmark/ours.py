"""This package's Lion, in each kernel and in each precision that it stores."""

import functools
import itertools
from collections.abc import Callable

import torch

from megatron_lion import Lion
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.telemetry import Telemetry
from tools.benchmark.measure import OURS, Candidate, first_line
from tools.benchmark.peers import FP32_MOMENTUM, HYPER
from tools.benchmark.shapes import bf16_twins, gradient
from tools.benchmark.traffic import counted, streams_of

MASTERS, MOMENTA = ("fp32", "remainder"), ("fp32", "bf16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Params = list[torch.nn.Parameter]


def builders(params: Params) -> dict[str, Callable[[], Candidate]]:
    """Functions that build ours on ``params`` as the peers step them, and on bf16 parameters, by name.

    Gradients are fp32, as Megatron accumulates them, and bf16 with the smallest state.
    """
    fused = f"{OURS} fused"
    made: dict[str, Callable[[], Candidate]] = {}
    for name, kernel in ((fused, "fused"), (f"{fused}, with telemetry", "fused"), (f"{OURS} foreach", "foreach")):
        made[name] = functools.partial(in_fp32, params, name, kernel, telemetry="telemetry" in name)
    cases = [(master, momentum, "fp32") for master, momentum in itertools.product(MASTERS, MOMENTA)]
    for master, momentum, grad in [*cases, ("remainder", "int8", "bf16")]:
        state = f"{master} master, {momentum} momentum" if master == "fp32" else f"remainder, {momentum} momentum"
        name = f"{fused}, {state}, {grad} gradient"
        made[name] = functools.partial(in_bf16, params, name, state, master, momentum, grad)
    return made


def build(params: Params) -> tuple[list[Candidate], dict[str, str]]:
    """All of :func:`builders` that work here, and for each other one the reason."""
    made, missing = [], {}
    for name, builder in builders(params).items():
        try:
            made.append(builder())
        except Exception as error:  # a kernel that this machine cannot have
            missing[name] = first_line(error)
    return made, missing


def gpu_builders(params: Params) -> dict[str, Callable[[], Candidate]]:
    """:func:`builders`, int8 momentum next to fp32 parameters (as FlashLion has it), and foreach on compact state."""
    compact = f"{OURS} foreach, remainder, int8 momentum, bf16 gradient"
    more = {
        f"{OURS} fused, int8 momentum": functools.partial(
            in_fp32, params, f"{OURS} fused, int8 momentum", "fused", momentum="int8"
        ),
        compact: functools.partial(
            in_bf16, params, compact, "remainder, int8 momentum", "remainder", "int8", "bf16", "foreach"
        ),
    }
    return builders(params) | more


def in_fp32(
    params: Params, name: str, kernel: str, *, telemetry: bool = False, momentum: str | None = None
) -> Candidate:
    """fp32 parameters and gradients: fused in one pass, or foreach in several."""
    optimizer = Lion(params, **HYPER, kernel=kernel, momentum_dtype=momentum)
    optimizer.telemetry = Telemetry() if telemetry else None
    return _stepped(optimizer, name, f"{momentum} momentum" if momentum else FP32_MOMENTUM, kernel)


def in_bf16(
    params: Params, name: str, state: str, master: str, momentum: str, grad: str, kernel: str = "fused"
) -> Candidate:
    """bf16 parameters, as Megatron's precision-aware optimizer holds them."""
    twins = bf16_twins(params)
    for twin, param in zip(twins, params, strict=True):
        twin.decoupled_grad = gradient(param).to(DTYPES[grad])
    optimizer = ShardedLion(twins, **HYPER, kernel=kernel, master_weights=master, momentum_dtype=momentum)
    optimizer.use_decoupled_grad = True
    return _stepped(optimizer, name, state, kernel)


def _stepped(optimizer: Lion, name: str, state: str, kernel: str) -> Candidate:
    optimizer.step()  # makes its state
    if kernel == "fused":
        return Candidate(name, state, optimizer.step, passes=[streams_of(optimizer)])
    return Candidate(name, state, optimizer.step, counted(optimizer.step))
