"""This package's Lion, in each kernel and in each precision that it stores."""

import itertools

import torch

from megatron_lion import Lion
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.telemetry import Telemetry
from tools.benchmark.measure import OURS, Candidate
from tools.benchmark.peers import FP32_MOMENTUM, HYPER
from tools.benchmark.shapes import gradient
from tools.benchmark.traffic import counted, streams_of

MASTERS, MOMENTA = ("fp32", "remainder"), ("fp32", "bf16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(params: list[torch.nn.Parameter]) -> tuple[list[Candidate], dict[str, str]]:
    """Ours on ``params`` as the peers step them, and on bf16 parameters with each master and momentum.

    Gradients are fp32, as Megatron accumulates them, and bf16 with the smallest state. What cannot be had here is named
    with the reason.
    """
    made, missing = in_fp32(params), {}
    cases = [(master, momentum, "fp32") for master, momentum in itertools.product(MASTERS, MOMENTA)]
    for master, momentum, grad in [*cases, ("remainder", "int8", "bf16")]:
        state = f"{master} master, {momentum} momentum" if master == "fp32" else f"remainder, {momentum} momentum"
        name = f"{OURS} fused, {state}, {grad} gradient"
        try:
            made.append(in_bf16(params, name, state, master, momentum, grad))
        except Exception as error:  # a kernel that this machine cannot have
            missing[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return made, missing


def in_fp32(params: list[torch.nn.Parameter]) -> list[Candidate]:
    """fp32 parameters, gradients and momentum: fused in one pass, with and without telemetry, foreach in several."""
    fused, watched, foreach = (Lion(params, **HYPER, kernel=kernel) for kernel in ("fused", "fused", "foreach"))
    watched.telemetry = Telemetry()
    for optimizer in (fused, watched, foreach):
        optimizer.step()
    return [
        Candidate(f"{OURS} fused", FP32_MOMENTUM, fused.step, passes=[streams_of(fused)]),
        Candidate(f"{OURS} fused, with telemetry", FP32_MOMENTUM, watched.step, passes=[streams_of(watched)]),
        Candidate(f"{OURS} foreach", FP32_MOMENTUM, foreach.step, counted(foreach.step)),
    ]


def in_bf16(
    params: list[torch.nn.Parameter], name: str, state: str, master: str, momentum: str, grad: str
) -> Candidate:
    """The fused kernel on bf16 parameters, as Megatron's precision-aware optimizer holds them."""
    halves = [torch.nn.Parameter(param.detach().bfloat16()) for param in params]
    for half, param in zip(halves, params, strict=True):
        half.decoupled_grad = gradient(param).to(DTYPES[grad])
    optimizer = ShardedLion(halves, **HYPER, kernel="fused", master_weights=master, momentum_dtype=momentum)
    optimizer.use_decoupled_grad = True
    optimizer.step()
    return Candidate(name, state, optimizer.step, passes=[streams_of(optimizer)])
