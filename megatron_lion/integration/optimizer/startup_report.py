"""The start-up line: what is active, counted over all ranks rather than read from the flags."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_lion import kernels
from megatron_lion.config import LionOptions, warning_about
from megatron_lion.integration import compat
from megatron_lion.integration.console import say, warn
from megatron_lion.integration.cpu import torch_cuda
from megatron_lion.integration.exchange import block_reduce, sign_gather
from megatron_lion.integration.optimizer.distributed import LionDistributedOptimizer
from megatron_lion.integration.optimizer.fsdp import LionFSDPOptimizer
from megatron_lion.integration.optimizer.offload import LIONS, OffloadingLion
from megatron_lion.integration.rehearsal import fake_ranks
from megatron_lion.integration.reporting import gradient_shards
from megatron_lion.step import StepKind
from megatron_lion.storage import Storage, storage_of


def report(options: LionOptions, config: Any, model_chunks: list[Any], optimizer: Any) -> None:
    """Say on rank 0 which parameters are on Lion and how large its state is. Issues two small all-reduces.

    A warning names each parameter that is not on Lion: none is silently left out.
    """
    covered = _parameters_on_lion(optimizer)
    # Pairs, not a dict: the stages of an interleaved pipeline share their parameters' names.
    trainable = [pair for chunk in model_chunks for pair in chunk.named_parameters() if pair[1].requires_grad]
    missed = [(name, param) for name, param in trainable if param not in covered]
    tensors, missed_tensors, elements = _count_over_ranks(
        *([param for _, param in pairs] for pairs in (trainable, missed))
    )
    sharding, state = _state_bytes(options, config, optimizer)
    kinds = _updated_kinds(optimizer)
    on_meta = any(kind.device.type == "meta" for kind in kinds)  # a rehearsal
    kernel = f"{options.kernel}, chosen on the GPU" if on_meta else kernels.describe(options.kernel, kinds)
    of_rank = f" of rank {torch.distributed.get_rank()}" if fake_ranks.is_active() else ""
    say(
        f"lion on {tensors - missed_tensors} of {tensors} parameters{of_rank} ({_count(elements)}), "
        f"betas ({options.betas[0]:g}, {options.betas[1]:g}), weight decay {config.weight_decay:g}, "
        f"{sharding}: {state} per rank, kernel {kernel}"
        + (f", {sign_gather.describe(optimizer)}" if options.gather == "signs" else "")
        + (f", {block_reduce.describe(options, optimizer)}" if options.reduce != "stock" else "")
    )
    if missed_tensors:
        names = ", ".join(name for name, _ in missed) or "none"
        warn(f"{missed_tensors} trainable parameters are not on Lion; on rank 0: {names}")
    if warning := warning_about(config.lr, config.weight_decay):
        warn(warning)
    if len(model_chunks) > 1 and not compat.installed_traits().waits_before_it_frees and not torch_cuda.wanted():
        warn(
            f"interleaved pipelines of megatron-core {compat.megatron_version()} free activations that are still being "
            "sent, which has been seen to end in NaN (Megatron pull request 4047): use 0.18 or later, or a pipeline "
            "that is not interleaved"
        )


def _parameters_on_lion(optimizer: Any) -> set[torch.nn.Parameter]:
    """The model's parameters (not the optimizer's shards of them) that Lion updates."""
    covered: set[torch.nn.Parameter] = set()
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if not isinstance(sub_optimizer.optimizer, LIONS):
            continue
        if hasattr(sub_optimizer, "model_param_group_index_map"):  # the distributed optimizer owns whole buffers
            covered.update(param for buffer in sub_optimizer.buffers for param in buffer.params)
        else:
            covered.update(param for param, _, _ in compat.updated_params(sub_optimizer))
    return covered


def _updated_kinds(optimizer: Any) -> list[StepKind]:
    """Devices and dtypes of this rank's updates, by which the kernel is chosen. If some are offloaded, only those."""
    sub_optimizers = compat.sub_optimizers_of(optimizer)
    if hybrids := _hybrids(sub_optimizers):
        params = _offloaded(sub_optimizers) or [param for hybrid in hybrids for param in hybrid.device_parameters()]
        return _distinct(Storage().kind(param, param.dtype) for param in params)
    return _distinct(
        _kind(sub_optimizer, param, inner, group)
        for sub_optimizer in sub_optimizers
        if isinstance(sub_optimizer.optimizer, LIONS)
        for param, inner, group in compat.updated_params(sub_optimizer)
    )


def _kind(sub_optimizer: Any, param: Any, inner: torch.Tensor, group: dict[str, Any]) -> StepKind:
    """The kind of the update of ``inner``, which is the inner optimizer's tensor for the model's ``param``."""
    if compat.is_precision_aware(sub_optimizer.config):
        return storage_of(group).kind(inner, getattr(param, "main_grad", inner).dtype)
    copied = isinstance(sub_optimizer, LionDistributedOptimizer) and sub_optimizer.lion_copies(param)
    return storage_of(group).kind(inner, inner.dtype, param.dtype if copied else None)


def _distinct(kinds: Iterable[StepKind]) -> list[StepKind]:
    return list(dict.fromkeys(kinds))


def _offloaded(sub_optimizers: list[Any]) -> list[torch.Tensor]:
    """The masters that are stepped on the CPU for a device."""
    return [param for hybrid in _hybrids(sub_optimizers) for param in hybrid.host_parameters()]


def _hybrids(sub_optimizers: list[Any]) -> list[OffloadingLion]:
    inner = [sub_optimizer.optimizer for sub_optimizer in sub_optimizers]
    return [optimizer for optimizer in inner if isinstance(optimizer, OffloadingLion)]


def _count_over_ranks(trainable: list[Any], missed: list[Any]) -> tuple[int, int, int]:
    """Numbers of trainable tensors, of missed tensors and of elements in the whole model, each parameter once.

    Every data-parallel replica adds 1/replicas of what it holds. A tensor-parallel parameter adds its elements on
    every rank of its group but counts as a tensor on the first one only; a tied copy on another stage adds nothing.
    If the other ranks do not exist, the numbers are those of this rank.
    """
    trainable, missed = (list(map(compat.original, params)) for params in (trainable, missed))
    if fake_ranks.is_active():
        return len(trainable), len(missed), sum(param.numel() for param in trainable)
    counts = [0.0, 0.0, 0.0]
    for column, params in enumerate((trainable, missed)):
        for param in (param for param in params if not gradient_shards.is_tied_copy(param)):
            replicas = gradient_shards.data_parallel_group(param).size()
            counts[column] += (gradient_shards.tensor_parallel_rank(param) == 0) / replicas
            if params is trainable and gradient_shards.is_counted(param):
                counts[2] += param.numel() / replicas
    sums = torch.tensor(counts, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    tensors, missed_tensors, elements = (round(value) for value in sums.tolist())
    return tensors, missed_tensors, elements


def _state_bytes(options: LionOptions, config: Any, optimizer: Any) -> tuple[str, str]:
    """How the state is laid out, and its bytes on the fullest rank."""
    momentum = master = dp = 0
    sub_optimizers = compat.sub_optimizers_of(optimizer)
    on_host = 8 * sum(param.numel() for param in _offloaded(sub_optimizers))  # an fp32 master and an fp32 momentum
    for sub_optimizer in sub_optimizers:
        if sub_optimizer.optimizer is None:
            continue
        if isinstance(sub_optimizer.optimizer, LIONS):
            sizes = sub_optimizer.optimizer.state_bytes()
            momentum, master = momentum + sizes[0], master + sizes[1]
        copies = getattr(
            sub_optimizer, "shard_fp32_from_float16_groups", getattr(sub_optimizer, "fp32_from_float16_groups", [])
        )
        master += sum(p.numel() * p.element_size() for group in copies for p in group if p is not None)
        if isinstance(sub_optimizer, LionFSDPOptimizer):
            master += sub_optimizer.master_bytes()
        elif config.use_distributed_optimizer:
            dp = max(dp, sub_optimizer.data_parallel_group.size())
    largest = torch.tensor([momentum, master, on_host, dp], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    momentum, master, on_host, dp = largest.tolist()
    kept = {"fp32": "fp32 master", "remainder": "16 bits for each bf16 parameter"}[options.master_weights]
    state = f"{options.momentum_dtype} momentum {_megabytes(momentum)}" + (
        f" + {kept} {_megabytes(master)}" if master else " (fp32 parameters are their own master)"
    )
    if isinstance(sub_optimizers[0], LionFSDPOptimizer):
        sharding = sub_optimizers[0].sharding()
    elif config.use_distributed_optimizer:
        sharding = f"state sharded over DP={dp}"
    else:
        sharding = "state on every rank, not sharded"
    return sharding, state + (f", {_megabytes(on_host)} of it on the CPU" if on_host else "")


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
