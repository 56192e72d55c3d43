"""Megatron's whole optimizer phase on the CPU: gradient norm, clipping, update and bf16 parameters, as it builds them.

The model is a list of parameters. Everything from its gradient buffers on is the real thing: DistributedDataParallel,
get_megatron_optimizer, DistributedOptimizer, ChainedOptimizer.step. Register megatron_lion before this is imported.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import megatron.core.optimizer as optimizers
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_lion.integration.compat import temporarily
from tools.benchmark.measure import OURS, Candidate
from tools.benchmark.traffic import READ, Stream, counted, streams_of

CLIP = 1.0
HYPER = {"lr": 1e-6, "min_lr": 1e-7, "weight_decay": 0.1, "clip_grad": CLIP}
HYPER |= {"lion_beta1": 0.9, "lion_beta2": 0.95, "adam_beta1": 0.9, "adam_beta2": 0.95}


def start_ranks() -> None:
    """Join the process group: torchrun's, or one of only this process."""
    # Switched off for Megatron's fused functions by the CPU backend; stock Lion's direction is compiled all the same.
    torch._dynamo.config.disable = False
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


class Parameters(torch.nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        values = (torch.randn(size) * 1e-2 for size in sizes)
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(value.to(dtype)) for value in values])


class Model:
    """The parameters in Megatron's buffers, with a gradient that can be put back after a step has scaled it.

    ``overlaps_gather`` is Megatron's --overlap-param-gather: the parameters' all-gather belongs to the next forward
    pass instead of the step.
    """

    def __init__(
        self, sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, overlaps_gather: bool = False
    ) -> None:
        torch.manual_seed(1234)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        layout = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_param_gather=overlaps_gather
        )
        self.dtype = dtype
        self.ddp = DistributedDataParallel(config, layout, Parameters(sizes, dtype))
        self.numel = sum(param.numel() for param in self.ddp.parameters())
        scale = 2 * CLIP / self.numel**0.5  # a norm that is clipped
        self._gradients = [torch.randn(buffer.grad_data.shape) * scale for buffer in self.ddp.buffers]
        self.restore_gradients()

    def restore_gradients(self) -> None:
        """Restore the gradient: Megatron scales it in place, so otherwise only the first step would clip. Waits for all
        ranks, so that a step does not include waiting for a rank at the previous one.
        """
        for buffer, gradient in zip(self.ddp.buffers, self._gradients, strict=True):
            buffer.grad_data.copy_(gradient)
        torch.distributed.barrier()


@dataclass(frozen=True)
class Phase:
    """How an optimizer is built. ``settings`` go to Megatron's configuration, ``merged`` bytes a compiler saves.

    ``norm`` names a row for only its gradient norm, if there is one.
    """

    name: str
    state: str
    optimizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    merged: int = 0
    fused_adam: bool = False
    norm: str = ""


ADAM, FP32 = "two fp32 moments, fp32 master", "fp32 momentum, fp32 master"
STOCK = {
    "adam": Phase("stock with Adam (torch AdamW as Megatron builds it)", ADAM, "adam"),
    "adam-fused": Phase("stock with Adam (torch AdamW, fused=True set by hand)", ADAM, "adam", fused_adam=True),
    # torch.compile makes one pass of 16 bytes of the direction's three operations, which move 32.
    "lion": Phase("stock with Lion (emerging-optimizers, on every parameter)", FP32, "stock-lion", merged=-16),
}
OWN = (
    Phase(f"{OURS}, fp32 master and momentum", FP32, "lion", norm="Megatron's gradient norm, part of the others"),
    Phase(
        f"{OURS}, fp32 master and momentum, --lion-fast-norm",
        FP32,
        "lion",
        {"lion_fast_norm": True},
        norm=f"{OURS}, gradient norm with --lion-fast-norm",
    ),
    Phase(
        f"{OURS}, remainder master, int8 momentum, --lion-fast-norm",
        "int8 momentum, remainder master",
        "lion",
        {
            "lion_master_weights": "remainder",
            "lion_momentum_dtype": "int8",
            "lion_kernel": "fused",
            "lion_fast_norm": True,
        },
    ),
    *(
        Phase(
            f"{OURS}, {master} master, {momentum} momentum",
            f"{momentum} momentum, {master} master",
            "lion",
            {"lion_master_weights": master, "lion_momentum_dtype": momentum, "lion_kernel": "fused"},
        )
        for master, momentum in (("fp32", "bf16"), ("remainder", "bf16"), ("remainder", "int8"))
    ),
)


def build(phase: Phase, model: Model) -> Any:
    """The optimizer that Megatron makes of ``phase`` around ``model``'s buffers."""
    name = "adam" if phase.optimizer == "stock-lion" else phase.optimizer
    is_bf16 = model.dtype == torch.bfloat16
    config = OptimizerConfig(optimizer=name, bf16=is_bf16, use_distributed_optimizer=True, **HYPER)
    for key, value in phase.settings.items():
        setattr(config, key, value)
    get = optimizers.get_megatron_optimizer
    if phase.optimizer == "lion":
        return get(config, [model.ddp])
    with _dispatched_as_lion() if phase.optimizer == "stock-lion" else contextlib.nullcontext():
        made = inspect.unwrap(get)(config, [model.ddp])
    for group in made.param_groups if phase.fused_adam else ():
        group["fused"], group["foreach"] = True, False
    return made


def _dispatched_as_lion() -> Any:
    """Stock Megatron has a branch for Lion on Adam's path (optimizer/__init__ 598), which its dispatch never takes.

    Its own ``--optimizer lion`` leaves embeddings and 1-D parameters to Adam and cannot shard state by elements; this
    is the most that its Lion can be.
    """
    stock = optimizers._get_megatron_optimizer_based_on_param_groups

    def based_on_param_groups(config: Any, *args: Any, **kwargs: Any) -> Any:
        with temporarily(config, optimizer="lion"):
            return stock(config, *args, **kwargs)

    return temporarily(optimizers, _get_megatron_optimizer_based_on_param_groups=based_on_param_groups)


def candidates_of(phase: Phase, model: Model) -> list[Candidate]:
    """Candidates of ``phase``: Megatron's whole step, and its norm. Makes their first steps."""
    made = build(phase, model)

    def step() -> None:
        done, norm, _ = made.step()
        if not (done and norm > CLIP):
            raise RuntimeError(f"{phase.name}: the step was skipped, or not clipped at norm {norm}")

    model.restore_gradients()
    step()
    model.restore_gradients()
    size, passes, norm = counted(step) + phase.merged * model.numel, [], []
    if phase.optimizer == "lion":  # Lion's kernels are called past torch: what was counted is Megatron's norm
        inner = [streams_of(part.optimizer) for part in made.chained_optimizers]
        grads = [Stream(streams[0].tensors, READ) for streams in inner]
        passes = [grads, *inner]
        size += sum(stream.bytes for streams in inner for stream in streams)
        size += sum(stream.bytes for stream in grads) if phase.settings.get("lion_fast_norm") else 0
        if phase.norm:
            norm = [Candidate(phase.norm, "gradient norm", made.get_grad_norm, passes=[grads])]
    return [Candidate(phase.name, phase.state, step, size, passes, model.restore_gradients), *norm]


def candidates(model: Model, peers: Sequence[str]) -> list[Candidate]:
    """All of ours and the named ones of stock on one model, and the all-gather if no step waits for it."""
    phases = (*OWN, *(STOCK[name] for name in peers))
    made = [one for phase in phases for one in candidates_of(phase, model)]
    if model.ddp.ddp_config.overlap_param_gather:
        gather = functools.partial(model.ddp.start_param_sync, force_sync=True)
        name = "all-gather of the bf16 parameters (gloo), not in the others"
        made.append(Candidate(name, "all", gather, prepare=torch.distributed.barrier))
    return made
