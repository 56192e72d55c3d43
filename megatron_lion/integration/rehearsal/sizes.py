"""Bytes of one rank and messages of one step, from the model and the optimizer that Megatron built."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_lion.integration import compat
from megatron_lion.integration.optimizer.offload import LIONS, OffloadingLion


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on one rank."""

    parameters: int
    """a number, not bytes; each parameter of the model on this rank counts"""
    weights: int
    gradients: int
    momentum: int
    """all moments, where the optimizer has several"""
    masters: int
    on_host: int
    """of momentum and masters: what an offloading optimizer keeps on the CPU"""

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.momentum + self.masters - self.on_host


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket of gradients: its elements, and those of them that belong to no parameter."""

    group: str
    ranks: int
    elements: int
    padding: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What this rank sends over one group in a step, with ring collectives of n ranks."""

    group: str
    collective: str
    ranks: int
    messages: int
    bytes: int


def sizes(model_chunks: list[Any], optimizer: Any) -> Sizes:
    """Sizes of ``model_chunks`` and ``optimizer``. State that does not exist before the first step is included."""
    buffers = _buffers(model_chunks)
    params = list(dict.fromkeys(param for chunk in model_chunks for param in chunk.parameters()))
    in_buffers = {param for _, buffer in buffers if buffer.param_data is not None for param in buffer.params}
    momentum = masters = on_host = 0
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if sub_optimizer.optimizer is not None:
            sub_momentum, sub_masters = _state(sub_optimizer)
            momentum, masters = momentum + sub_momentum, masters + sub_masters
            if isinstance(sub_optimizer.optimizer, OffloadingLion):
                on_host += 8 * sum(param.numel() for param in sub_optimizer.optimizer.host_parameters())
    return Sizes(
        parameters=sum(param.numel() for param in params),
        weights=sum(_bytes(buffer.param_data) for _, buffer in buffers if buffer.param_data is not None)
        + sum(_bytes(param) for param in params if param not in in_buffers),
        gradients=sum(_bytes(tensor) for _, buffer in buffers for tensor in _gradients(buffer)),
        momentum=momentum,
        masters=masters,
        on_host=on_host,
    )


def buckets(model_chunks: list[Any]) -> list[Bucket]:
    """The buckets of the gradient buffers."""
    return [
        Bucket(
            group=group,
            ranks=buffer.data_parallel_world_size,
            elements=bucket.grad_data.numel(),
            padding=bucket.grad_data.numel() - sum(param.numel() for param in bucket.params),
        )
        for group, buffer in _buffers(model_chunks)
        for bucket in buffer.buckets
    ]


def traffic(model_chunks: list[Any], optimizer: Any) -> list[Traffic]:
    """What the gradients and the updated weights of one step make this rank send.

    Without ``--overlap-param-gather`` each sub-optimizer gathers all weights of its chunks, also those of another one
    (0.19.2: distrib_optimizer 3185). With experts that is twice.
    """
    found: dict[tuple[str, str, int], list[int]] = {}

    def add(group: str, collective: str, ranks: int, sent: float, times: int = 1) -> None:
        if ranks > 1:
            count = found.setdefault((group, collective, ranks), [0, 0])
            count[0] += times
            count[1] += times * round(sent)

    for owner, group, buffer in ((chunk, *each) for chunk in model_chunks for each in _buffers([chunk])):
        ranks = buffer.data_parallel_world_size
        share = (ranks - 1) / ranks
        gathers = 1 if buffer.ddp_config.overlap_param_gather else _sharing_optimizers(owner, optimizer)
        for bucket in buffer.buckets:
            if buffer.param_data is None:
                add(group, "all-reduce of gradients", ranks, 2 * share * _bytes(bucket.grad_data))
            else:
                add(group, "reduce-scatter of gradients", ranks, share * _bytes(bucket.grad_data))
                add(group, "all-gather of weights", ranks, share * _bytes(bucket.param_data), gathers)
                instances = getattr(buffer.ddp_config, "num_distributed_optimizer_instances", 1)
                shard = _bytes(bucket.grad_data) / ranks
                sent = 2 * (instances - 1) / instances * shard
                add(f"{group}, optimizer instances", "all-reduce of gradient shards", instances, sent)
    for name, group, size in _model_parallel_gradients(model_chunks):
        ranks = group.size()
        add(name, "all-reduce of gradients", ranks, 2 * (ranks - 1) / ranks * size)
    return [
        Traffic(group=group, collective=collective, ranks=ranks, messages=messages, bytes=sent)
        for (group, collective, ranks), (messages, sent) in found.items()
    ]


def _sharing_optimizers(chunk: Any, optimizer: Any) -> int:
    """The number of sub-optimizers of ``chunk``."""
    return sum(any(chunk is each for each in one.model_chunks) for one in compat.sub_optimizers_of(optimizer))


def _model_parallel_gradients(model_chunks: list[Any]) -> list[tuple[str, Any, int]]:
    """Gradients that ranks of one replica add up: of tied embeddings, and of norms with sequence parallelism."""
    from megatron.core import parallel_state as mpu

    params = [param for chunk in model_chunks for param in chunk.parameters() if param.requires_grad]
    tied = sum(_bytes(param.main_grad) for param in params if getattr(param, "shared_embedding", False))
    whole = sum(_bytes(param.main_grad) for param in params if getattr(param, "sequence_parallel", False))
    found = []
    if tied and mpu.get_pipeline_model_parallel_world_size() > 1:
        found.append(("tied embeddings", mpu.get_embedding_group(), tied))
    if whole:
        found.append(("tensor parallel", mpu.get_tensor_model_parallel_group(), whole))
    return found


def _buffers(model_chunks: list[Any]) -> list[tuple[str, Any]]:
    """Megatron's buffers, each with the name of the group that reduces it."""
    return [
        (name, buffer)
        for chunk in model_chunks
        for name, buffers in (
            ("data parallel", getattr(chunk, "buffers", ())),
            ("expert data parallel", getattr(chunk, "expert_parallel_buffers", ())),
        )
        if isinstance(buffers, list)  # a torch module has a method of the name
        for buffer in buffers
    ]


def _gradients(buffer: Any) -> list[torch.Tensor]:
    return [buffer.grad_data, *getattr(buffer, "extra_main_grads", ())]


def _state(sub_optimizer: Any) -> tuple[int, int]:
    """Bytes of moments and of master weights."""
    inner = sub_optimizer.optimizer
    copies = getattr(
        sub_optimizer, "shard_fp32_from_float16_groups", getattr(sub_optimizer, "fp32_from_float16_groups", [])
    )
    masters = sum(_bytes(param) for group in copies for param in group if param is not None)
    if isinstance(inner, LIONS):
        momentum, own_masters = inner.state_bytes()
        return momentum, masters + own_masters
    elements = sum(param.numel() for group in inner.param_groups for param in group["params"] if param is not None)
    moments = 2 if "betas" in inner.defaults else int(bool(inner.defaults.get("momentum")))
    return 4 * moments * elements, masters


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
