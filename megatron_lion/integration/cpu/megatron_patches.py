"""What of Megatron itself is replaced where the CPU stands in for a GPU: see ``cpu_backend``.

Line numbers are megatron-core 0.19.2's.
"""

import functools
import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_lion.integration import compat
from megatron_lion.integration.compat import substituted


def adapt_core() -> None:
    """The places in ``megatron.core`` that need CUDA in another way than through torch."""
    import megatron.core.tensor_parallel.random as megatron_random

    # It calls torch._C directly (random 147).
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # One generator is both the CPU's and the "device's" here, so it warns at every dropout region (random 336).
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _allow_sequence_parallel_norms()
    _tell_host_from_device()
    if not compat.known().waits_before_it_frees:
        _keep_what_is_sent()
    _copy_what_is_written_behind()


class _HostCopies(TorchFunctionMode):
    """Answers ``is_cuda``: false for what ``Tensor.cpu`` returned and what was made from that, true for all else."""

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


def _tell_host_from_device() -> None:
    """Let the optimizer of ``--optimizer-cpu-offload`` offload: it takes what ``is_cuda`` says for the device's."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    stock_groups = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(stock_groups)
    def groups(self: Any, offload_fraction: float) -> Any:
        with _HostCopies():
            return stock_groups(self, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups


def _copy_what_is_written_behind() -> None:
    """Give the writer of ``--async-save`` copies: training goes on while it writes.

    What lies on a GPU is copied to the host before (filesystem_async 243); what lies there already would be shared, and
    change under the writer.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    stock_get = FileSystemWriterAsync.get_save_function_and_args

    def get_save_function_and_args(self: Any) -> Any:
        self.write_buckets = [
            (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (data, tensors) in self.write_buckets or ()
        ]
        return stock_get(self)

    FileSystemWriterAsync.get_save_function_and_args = get_save_function_and_args


def _keep_what_is_sent() -> None:
    """Keep an activation's memory while an interleaved pipeline sends it, where Megatron frees it meanwhile.

    Before 0.18 it does (Megatron pull request 4047), which gloo, that sends later than NCCL, turns into other losses
    and NaN in every run. A second view of the memory lives as long as the request.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    stock_send = P2PCommunicator.send_forward_recv_forward

    @functools.wraps(stock_send)
    def send_forward_recv_forward(self: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent = None if output_tensor is None else output_tensor.detach()
        return stock_send(self, sent, *args, **kwargs)

    P2PCommunicator.send_forward_recv_forward = send_forward_recv_forward


def _allow_sequence_parallel_norms() -> None:
    """Let torch's LayerNorm be used with sequence parallel, as the fused norms that need CUDA are.

    Megatron refuses it (torch_norm 50) because torch's norms do not mark their parameters, whose gradients must be
    summed over the tensor-parallel group. So the mark is set here, as its FusedLayerNorm does (fused_layer_norm 119).
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    stock_new = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        with substituted(config, sequence_parallel=False):
            norm = stock_new(cls, config, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def adapt_training() -> None:
    """Megatron's loop insists on CUDA unless its own ``initialize_megatron`` is told otherwise (initialize 64)."""
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
