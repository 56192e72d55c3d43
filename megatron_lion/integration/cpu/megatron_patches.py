"""Patches of Megatron for running without a GPU. ``torch_cuda`` has those of torch.

Line numbers are megatron-core 0.19.2's.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_lion.integration.compat import temporarily, wrap


def set_cuda_rng_state(stock: Callable[..., Any], state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """The CPU's generator stands in for the device's. Stock calls torch._C directly (random 147)."""
    torch.set_rng_state(state)


def silence_rng_warnings() -> None:
    """Drop a warning: one generator is both the CPU's and the "device's", so each dropout region warns (random 336)."""
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


class _HostCopies(TorchFunctionMode):
    """Answers ``is_cuda``: false for results of ``Tensor.cpu`` and tensors made from them, true for all others."""

    def __init__(self) -> None:
        super().__init__()
        self._on_host: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_on_host = bool(args) and any(args[0] is tensor for tensor in self._on_host)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not is_on_host
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu or (is_on_host and isinstance(result, torch.Tensor)):
            self._on_host.append(result)
        return result


def get_sub_optimizer_param_groups(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make ``--optimizer-cpu-offload`` work: its optimizer asks ``is_cuda`` which tensors are on the device."""
    with _HostCopies():
        return stock(*args, **kwargs)


def get_save_function_and_args(stock: Callable[..., Any], writer: Any) -> Any:
    """Give the writer of ``--async-save`` copies, because training continues while it writes.

    Megatron copies tensors of a GPU to the host first (filesystem_async 243). Tensors on the host would be shared, and
    change during the write.
    """
    writer.write_buckets = [
        (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (data, tensors) in writer.write_buckets or ()
    ]
    return stock(writer)


def send_forward_recv_forward(
    stock: Callable[..., Any], communicator: Any, output_tensor: Any, *args: Any, **kwargs: Any
) -> Any:
    """Keep an activation's memory while an interleaved pipeline sends it, where Megatron frees it meanwhile.

    Before 0.18 it does (Megatron pull request 4047). gloo sends later than NCCL, so every run then has wrong losses and
    NaN. A second view keeps the memory alive as long as the request.
    """
    sent = None if output_tensor is None else output_tensor.detach()
    return stock(communicator, sent, *args, **kwargs)


def new_torch_norm(stock: Callable[..., Any], cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Let torch's LayerNorm be used with sequence parallel, as the fused norms that need CUDA are.

    Megatron refuses it (torch_norm 50) because torch's norms do not mark their parameters: the gradients of marked ones
    are summed over the tensor-parallel group. So the mark is set here, as its FusedLayerNorm does (fused_layer_norm
    119).
    """
    with temporarily(config, sequence_parallel=False):
        norm: torch.nn.Module = stock(cls, config, *args, **kwargs)
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def allgather_params(stock: Callable[..., Any], optimizer: Any) -> None:
    """Let Muon's sharded optimizer broadcast parameters: gloo gathers only pieces of one length (layer_wise 772)."""
    optimizer.broadcast_params()


def initialize_megatron(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's loop insists on CUDA unless its own ``initialize_megatron`` is told otherwise (initialize 64)."""
    return stock(*args, **{"allow_no_cuda": True, **kwargs})


_CORE = "megatron.core"
CORE = (
    wrap(f"{_CORE}.tensor_parallel.random:_set_cuda_rng_state", set_cuda_rng_state, parameters=("new_state",)),
    wrap(
        f"{_CORE}.transformer.torch_norm:WrappedTorchNorm.__new__",
        new_torch_norm,
        parameters=("cls", "config"),
        uses=("sequence_parallel",),
    ),
    wrap(
        f"{_CORE}.optimizer.cpu_offloading:HybridDeviceOptimizer._get_sub_optimizer_param_groups",
        get_sub_optimizer_param_groups,
        uses=("is_cuda",),
    ),
    wrap(
        f"{_CORE}.pipeline_parallel.p2p_communication:P2PCommunicator.send_forward_recv_forward",
        send_forward_recv_forward,
        parameters=("output_tensor",),
        until="0.17",
    ),
    wrap(
        f"{_CORE}.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.get_save_function_and_args",
        get_save_function_and_args,
        uses=("write_buckets",),
    ),
    wrap(
        f"{_CORE}.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.allgather_params",
        allgather_params,
        parameters=("self",),
        since="0.18",
    ),
)
TRAINING = (wrap("megatron.training.training:initialize_megatron", initialize_megatron, parameters=("allow_no_cuda",)),)
