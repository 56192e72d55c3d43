"""Plan what a save of this run writes, and check that the checkpoint of ``--load`` fits, without its tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats

# The sizes of a layout that a checkpoint may be converted between.
LAYOUT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "expert_model_parallel_size": "EP",
    "data_parallel_size": "DP",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the ranks of one pipeline stage contribute to a checkpoint."""

    whole: dict[str, int]
    """bytes of each tensor that is saved by its name, over all ranks and stages"""
    state_of_stage: int
    """bytes of optimizer state that is saved by buckets, over all ranks of this stage"""
    files_of_rank: int
    """files of tensors that each rank writes, as long as it has so many tensors"""


@dataclass
class Loaded:
    """The checkpoint of ``--load``, as far as its metadata says."""

    folder: str
    iteration: int
    tensors: int
    converted: list[str] = field(default_factory=list)


class _Checked(BaseException):
    """Ends a load where the tensors would be read."""


def plan(args: Any, model_chunks: list[Any], optimizer: Any) -> Plan | None:
    """The plan of a ``torch_dist`` checkpoint; None for another format, or where nothing is saved."""
    if not args.save or args.ckpt_format != "torch_dist":
        return None
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.training import checkpointing

    metadata = checkpointing._build_sharded_state_dict_metadata(args)
    metadata.setdefault("dp_cp_group", mpu.get_data_parallel_group(with_context_parallel=True))
    state_dict = checkpointing.generate_state_dict(
        args,
        checkpointing.unwrap_model(model_chunks),
        optimizer,
        None,
        None,
        optim_sd_kwargs={"metadata": metadata, "is_loading": True},  # a save would gather real tensors
        model_sd_kwargs={"metadata": metadata},
    )
    state_dict.pop("args")
    state = state_dict.pop("optimizer", None)
    by_bucket = args.use_distributed_optimizer and not args.dist_ckpt_optim_fully_reshardable
    whole = [*_sharded(state_dict, ShardedTensor), *([] if by_bucket else _sharded(state, ShardedTensor))]
    ranks = torch.distributed.get_world_size() // args.pipeline_model_parallel_size
    sub_optimizers = compat.sub_optimizers_of(optimizer)
    parts = [state] if len(sub_optimizers) == 1 else [state[index] for index in range(len(sub_optimizers))]
    return Plan(
        whole={tensor.key: _global_bytes(tensor) for tensor in whole},
        state_of_stage=sum(
            ranks // sub_optimizer.data_parallel_group.size() * _global_bytes(tensor)
            for sub_optimizer, part in zip(sub_optimizers, parts, strict=True)
            for tensor in {tensor.key: tensor for tensor in _sharded(part, ShardedTensor)}.values()
        )
        if by_bucket and state is not None
        else 0,
        # Megatron ignores the flag for its other saves (0.19.2: checkpointing 781).
        files_of_rank=args.dist_ckpt_workers if args.async_save and args.ckpt_assume_constant_structure else 1,
    )


def load_metadata(args: Any, stock: Callable[..., Any], *positional: Any, **named: Any) -> tuple[Any, Loaded | None]:
    """Call Megatron's ``load_checkpoint`` up to where it reads tensors. Returns its result and what was checked.

    Raises LionError for a checkpoint that does not fit. Without ``--load`` the second value is None.
    """
    from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
    from megatron.training import checkpointing

    if args.load and checkpointing.checkpoint_exists(args.load):
        folder = checkpointing.get_load_checkpoint_path_by_args(args)
        if not check_is_distributed_checkpoint(folder):
            formats.refuse_other_shards(args)
            unknown = "unknown, the legacy format has no metadata. Only the names of its shards were checked"
            return (0, 0), Loaded(folder=str(folder), iteration=0, tensors=0, converted=[unknown])
    found: list[Loaded] = []

    def load(sharded_state_dict: Any, checkpoint_dir: Any, *_: Any, **__: Any) -> None:
        found.append(_check(args, sharded_state_dict, str(checkpoint_dir)))
        raise _Checked

    try:
        with compat.temporarily(checkpointing.dist_checkpointing, load=load):
            result = stock(*positional, **named)
    except _Checked:
        return (found[0].iteration, 0), found[0]
    return result, Loaded(folder=str(args.load), iteration=0, tensors=0) if args.load else None


def _check(args: Any, sharded_state_dict: Any, folder: str) -> Loaded:
    """Raise LionError where a tensor that this rank would read is missing or has another shape in ``folder``."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    saved = dist_checkpointing.load_tensors_metadata(folder)
    wanted = list(_sharded(sharded_state_dict, ShardedTensor))
    missing = sorted({tensor.key for tensor in wanted} - saved.keys())
    if missing:
        raise LionError(
            f"{folder} lacks {len(missing)} of the tensors that this rank would load, such as {missing[0]}: the model "
            "or the optimizer is another one"
        )
    for tensor in wanted:
        shape = tuple(saved[tensor.key].global_shape)
        if shape != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            raise LionError(
                f"{tensor.key} has shape {shape} in {folder} and {tuple(tensor.global_shape)} in this run: the model "
                "is another one"
            )
    common = dist_checkpointing.load_common_state_dict(folder)
    loaded = Loaded(folder=folder, iteration=int(common.get("iteration", 0)), tensors=len(wanted))
    loaded.converted = _converted(common.get("args"), args)
    return loaded


def _converted(saved_args: Any, args: Any) -> list[str]:
    """What a load would convert: the layout, and the precision of the state."""
    found = []
    for dest, name in LAYOUT.items():
        saved, running = getattr(saved_args, dest, None), getattr(args, dest, None)
        if None not in (saved, running) and saved != running:
            found.append(f"{name} {saved} to {running}")
    saved_optimizer = getattr(saved_args, "optimizer", args.optimizer)
    if saved_optimizer != args.optimizer:
        found.append(f"optimizer {saved_optimizer} to {args.optimizer} (--lion-init-from {args.lion_init_from})")
    if args.optimizer == "lion":
        for dest, what in (("lion_momentum_dtype", "momentum"), ("lion_master_weights", "master weights")):
            saved, running = getattr(saved_args, dest, None) or "fp32", getattr(args, dest)
            if saved != running:
                found.append(f"{what} {saved} to {running}")
    return found


def _sharded(tree: Any, kind: type) -> Iterator[Any]:
    """Every ``kind`` in nested dicts and lists. A factory, which cuts a tensor in several, is applied."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, ShardedTensorFactory):
        yield from _sharded(tree.build(), kind)
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _sharded(value, kind)


def _global_bytes(tensor: Any) -> int:
    elements = 1
    for size in tensor.global_shape:
        elements *= size
    return elements * int(tensor.dtype.itemsize)
