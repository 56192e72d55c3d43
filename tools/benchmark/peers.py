"""Optimizers of other packages. Those that are not installed are listed with the reason."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lion.config import LionError
from megatron_lion.nearest import did_you_mean
from tools.benchmark.measure import Candidate, first_line
from tools.benchmark.shapes import bf16_twins, gradient
from tools.benchmark.traffic import counted, streams_of

HYPER = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1}
FP32_MOMENTUM, TWO_MOMENTS = "fp32 momentum", "two fp32 moments"

ONE_PASS, BY_OPERATION, UNKNOWN = "one pass", "by operation", "unknown"
Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """An optimizer of the package ``module``: how it is built, and how its bytes are counted.

    ``passes`` is ONE_PASS for a fused step; BY_OPERATION for one made of torch's operations, which are counted; bytes
    per parameter, added up from its source, where a compiler merges some operations; UNKNOWN where it hides them.
    ``untouched`` names state that it keeps and its step never reads.
    """

    module: str
    name: str
    state: str = FP32_MOMENTUM
    passes: str | int = BY_OPERATION
    options: tuple[tuple[str, object], ...] = ()
    without: tuple[str, ...] = ()
    compiles_for_minutes: bool = False
    device: str | None = None
    untouched: tuple[str, ...] = ()
    bf16: bool = False

    def build(self, params: Params) -> torch.optim.Optimizer:
        """The optimizer on ``params``, or on bf16 parameters and gradients of the same values."""
        if self.bf16:
            twins = bf16_twins(params)
            for twin, param in zip(twins, params, strict=True):
                twin.grad = gradient(param).bfloat16()
            params = twins
        hyper = {key: value for key, value in HYPER.items() if key not in self.without} | dict(self.options)
        return getattr(importlib.import_module(self.module), self.name)(params, **hyper)


class CompiledForeachLion(torch.optim.Optimizer):
    """A foreach Lion under torch.compile, the way microsoft/dion's scalar_opts.py has it."""

    def __init__(self, params: Params, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for param in params:
            self.state[param]["momentum"] = torch.zeros_like(param)
        grads, momenta = [gradient(param) for param in params], [self.state[param]["momentum"] for param in params]
        values, (beta1, beta2) = [param.detach() for param in params], betas

        @torch.compile(fullgraph=True)
        def update(values: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
            signs = torch._foreach_sign(torch._foreach_lerp(momenta, grads, 1 - beta1))
            torch._foreach_lerp_(momenta, grads, 1 - beta2)
            torch._foreach_mul_(values, 1 - lr * weight_decay)
            torch._foreach_add_(values, signs, alpha=-lr)

        self.step = lambda: update(values, grads, momenta)  # type: ignore[method-assign, assignment]


FUSED, FOREACH = (("fused", True),), (("foreach", True),)
SGD = (("momentum", 0.9), *FUSED)
PEERS = {
    "torch AdamW fused": Peer("torch.optim", "AdamW", TWO_MOMENTS, ONE_PASS, FUSED),
    "torch AdamW foreach": Peer("torch.optim", "AdamW", TWO_MOMENTS, options=FOREACH),
    "torch SGD with momentum, fused": Peer("torch.optim", "SGD", passes=ONE_PASS, options=SGD, without=("betas",)),
    "compiled foreach Lion": Peer(__name__, "CompiledForeachLion", passes=ONE_PASS, compiles_for_minutes=True),
    # The compiled direction reads gradient and momentum and writes momentum and direction; the decay reads and writes
    # the parameter; the step reads parameter and direction and writes the parameter.
    "emerging-optimizers Lion": Peer("emerging_optimizers.scalar_optimizers", "Lion", passes=16 + 8 + 12),
    "lion-pytorch eager": Peer("lion_pytorch", "Lion"),
    "lion-pytorch foreach": Peer("lion_pytorch.foreach", "Lion"),
    "pytorch_optimizer Lion foreach": Peer("pytorch_optimizer", "Lion", options=FOREACH),
    "timm Lion foreach": Peer("timm.optim", "Lion", options=FOREACH),
    "DeepSpeed CPULion": Peer(
        "deepspeed.ops.lion",
        "DeepSpeedCPULion",
        passes=ONE_PASS,
        compiles_for_minutes=True,
        device="cpu",
        untouched=("exp_avg_sq",),  # made, kept and saved, but not given to its kernel
    ),
    "DeepSpeed FusedLion": Peer("deepspeed.ops.lion", "FusedLion", passes=ONE_PASS, device="cuda"),
    # On a CPU bitsandbytes has no kernel for Lion: it makes one operation from torch's operations.
    "bitsandbytes Lion": Peer("bitsandbytes.optim", "Lion32bit", passes=UNKNOWN),
    "bitsandbytes Lion8bit": Peer("bitsandbytes.optim", "Lion8bit", "int8 momentum", ONE_PASS, device="cuda"),
    "flashoptim FlashLion": Peer(
        "flashoptim", "FlashLion", "int8 momentum", ONE_PASS, (("master_weight_bits", None),), device="cuda"
    ),
    # 16 bits of error correction next to bf16 parameters: as many bits as our remainders.
    "flashoptim FlashLion, bf16": Peer(
        "flashoptim",
        "FlashLion",
        "remainder, int8 momentum",
        ONE_PASS,
        (("master_weight_bits", 32),),
        device="cuda",
        bf16=True,
    ),
    "Transformer Engine FusedAdam": Peer(
        "transformer_engine.pytorch.optimizers", "FusedAdam", TWO_MOMENTS, ONE_PASS, device="cuda"
    ),
}


def chosen(asked: Sequence[str]) -> list[str]:
    """The peers that ``asked`` means: "all", "installed" (none that compiles for minutes), or names."""
    if list(asked) == ["all"]:
        return list(PEERS)
    if list(asked) in ([], ["installed"]):
        return [name for name, peer in PEERS.items() if not peer.compiles_for_minutes]
    for name in asked:
        if name not in PEERS:
            raise LionError(f"--peers {name!r} is unknown: {did_you_mean(name, [*PEERS, 'all', 'installed'])}")
    return list(asked)


def reason_missing(peer: Peer, device: str) -> str | None:
    """Why ``peer`` cannot be measured on ``device``, as far as that is known before it is tried."""
    if peer.device not in (None, device):
        return f"it runs on {peer.device} only"
    package = peer.module.split(".")[0]
    return None if importlib.util.find_spec(package) else f"{package} is not installed: tools/benchmark/peers.txt"


def build(params: Params, names: Sequence[str], device: str) -> tuple[list[Candidate], dict[str, str]]:
    """The peers among ``names`` that could be built and stepped here, and why each other peer is not there."""
    asked_for = {name: "not asked for (--peers all has it)" for name in PEERS if name not in names}
    made, missing = [], {}
    for name in names:
        problem = reason_missing(PEERS[name], device)
        if problem is None:
            try:
                made.append(candidate(name, params))
            except Exception as error:  # whatever an unsuitable peer raises is the result
                problem = first_line(error)
        if problem is not None:
            missing[name] = problem
    return made, missing | asked_for


def candidate(name: str, params: Params) -> Candidate:
    """The peer ``name``, built on ``params`` and stepped once."""
    peer = PEERS[name]
    optimizer = peer.build(params)
    optimizer.step()  # makes its state
    if peer.passes == ONE_PASS:
        return Candidate(name, peer.state, optimizer.step, passes=[streams_of(optimizer, peer.untouched)])
    size = None
    if peer.passes == BY_OPERATION:
        size = counted(optimizer.step)
    elif isinstance(peer.passes, int):
        size = peer.passes * sum(param.numel() for param in params)
    return Candidate(name, peer.state, optimizer.step, size)
