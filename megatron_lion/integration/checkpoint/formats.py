"""Checkpoint formats: what each holds, and which layouts of ranks it can be loaded into."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_lion.config import LionError, LionOptions

SAVE_WITH = "--dist-ckpt-optim-fully-reshardable"
# Sizes that cannot change in dp_reshardable, which saves Megatron's buckets. Megatron itself compares the first two.
FIXED = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "virtual PP",
}
FIXED_FOR_EXPERTS = {"expert_model_parallel_size": "EP", "expert_tensor_parallel_size": "expert TP"}
# Megatron has a separate optimizer for experts only if expert parallel is above 1.
EXPERTS_APART = (
    "the checkpoint's optimizer state is divided differently between dense and expert parameters than this run's, and "
    "Megatron cannot convert it: resume with the --expert-model-parallel-size that it was saved with, or load only "
    "the weights (--no-load-optim)"
)
# Megatron-FSDP's.
FSDP_FORMAT = "fsdp_dtensor"
# The state of one parameter in an fsdp_dtensor checkpoint.
FSDP_STATE_KEY = re.compile(r"^optimizer\.state\..*\.(\w+)$")
# The state of one parameter, or of one bucket of parameters, in a torch_dist checkpoint.
STATE_KEY = re.compile(r"\boptimizer\.state\.(\w+)\.|\boptimizer\.distributed\..*\.(\w+)$")
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer"})


def moments(state: dict[str, Any], path: str) -> frozenset[str]:
    """The kinds of momentum in the checkpoint at ``path``. Empty if unknown.

    Read from the names of the tensors of a ``torch_dist`` or ``fsdp_dtensor`` checkpoint, or from the parameter groups
    in ``state`` for the legacy format.
    """
    from megatron.core import dist_checkpointing

    if dist_checkpointing.check_is_distributed_checkpoint(path):
        return kinds_of_momentum(dist_checkpointing.load_tensors_metadata(path))
    if (Path(path) / ".metadata").is_file():
        found = map(FSDP_STATE_KEY.match, FileSystemReader(path).read_metadata().state_dict_metadata)
        return MOMENTS & {match[1] for match in found if match}
    parts = state.get("optimizer") or []
    parts = [part.get("optimizer", part) for part in (parts if isinstance(parts, list) else [parts])]
    keys = {key for part in parts for group in part.get("param_groups", ()) for key in group}
    if "momentum_init" in keys:
        return frozenset({"exp_avg"})
    return frozenset({"exp_avg", "exp_avg_sq"}) if "eps" in keys else frozenset()


def kinds_of_momentum(keys: Iterable[str]) -> frozenset[str]:
    """The kinds of momentum among the keys of a ``torch_dist`` checkpoint."""
    found = (STATE_KEY.search(key) for key in keys)
    return MOMENTS & {match[1] or match[2] for match in found if match}


def refuse_foreign_format(args: Any) -> None:
    """Raise LionError for a ``--ckpt-format`` that does not fit to how the run is sharded."""
    is_fsdp = getattr(args, "use_megatron_fsdp", False)
    if args.ckpt_format == "torch_dcp":
        raise LionError(
            "--ckpt-format torch_dcp is the format of torch FSDP2, which Lion does not support: use torch_dist, the "
            "default, or torch"
        )
    if args.ckpt_format == FSDP_FORMAT and not is_fsdp:
        raise LionError(
            f"--ckpt-format {FSDP_FORMAT} is the format of Megatron-FSDP: add --use-megatron-fsdp, or use torch_dist, "
            "the default, or torch"
        )
    if args.ckpt_format != FSDP_FORMAT and is_fsdp:
        raise LionError(
            f"--use-megatron-fsdp cannot save or load --ckpt-format {args.ckpt_format}: add --ckpt-format {FSDP_FORMAT}"
        )


def saves_stacks(args: Any) -> bool:
    """Whether this run's checkpoints stack the layers of each parameter."""
    by_parameter = args.dist_ckpt_optim_fully_reshardable or not args.use_distributed_optimizer
    return bool(args.save and args.ckpt_format == "torch_dist" and by_parameter)


def refuse_layers_frozen_apart(options: LionOptions, model_chunks: list[Any]) -> None:
    """Raise LionError, on every rank, for a parameter with stacked state that is frozen in only some layers.

    Megatron would end at its first save (0.19.2: "Invalid sharding pattern validation"). If state is stacked, issues
    one gather of names over all ranks.
    """
    if not options.saves_stacks:
        return
    mine = {
        (re.sub(r"\blayers\.\d+\.", "layers.*.", name), param.requires_grad)
        for chunk in model_chunks
        for name, param in chunk.named_parameters()
        if re.search(r"\blayers\.\d+\.", name)
    }
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    found = set().union(*gathered)
    apart = sorted(name for name, is_trained in found if is_trained and (name, False) in found)
    if apart:
        raise LionError(
            f"{len(apart)} kinds of parameters are trained in some layers and frozen in others, {apart[0]} among them, "
            "and Megatron cannot save their optimizer state in stacks of layers: use --use-distributed-optimizer "
            f"without {SAVE_WITH}"
        )


def refuse_another_layout(load_dir: str, state: dict[str, Any], saved_args: Any, args: Any) -> None:
    """Raise LionError if the optimizer state in ``load_dir`` cannot be loaded into this run's layout.

    Megatron 0.19.2 names a flag that does not help (checkpointing 2255), or fails later with a list of keys.
    """
    if not hasattr(args, "data_parallel_size"):  # the command line is not complete yet (--use-checkpoint-args)
        return
    saved_format, running_format = getattr(saved_args, "ckpt_format", args.ckpt_format), args.ckpt_format
    if FSDP_FORMAT in (saved_format, running_format):
        if saved_format != running_format:
            raise LionError(
                f"the checkpoint in {load_dir} is in the format {saved_format} and this run's is {running_format}: "
                f"Megatron-FSDP reads only {FSDP_FORMAT}, and other runs cannot read that. Resume as it was saved"
            )
        return  # it is for any layout
    from megatron.core.dist_checkpointing import load_content_metadata

    saved_sharded = getattr(saved_args, "use_distributed_optimizer", args.use_distributed_optimizer)
    if saved_sharded != args.use_distributed_optimizer:
        one, other = ("with", "without") if saved_sharded else ("without", "with")
        raise LionError(
            f"the optimizer state in {load_dir} was saved {one} --use-distributed-optimizer and this run is {other} "
            "it: Megatron's two formats differ. Resume as it was saved, or load only the weights (--no-load-optim)"
        )
    if getattr(args, "num_experts", None) and _has_experts_apart(saved_args) != _has_experts_apart(args):
        raise LionError(EXPERTS_APART)
    fixed = FIXED | (FIXED_FOR_EXPERTS if getattr(args, "num_experts", None) else {})
    sizes = [(name, getattr(saved_args, size, None) or 1, getattr(args, size) or 1) for size, name in fixed.items()]
    changed = [f"{name} {saved} to {running}" for name, saved, running in sizes if saved != running]
    sharding = (load_content_metadata(preloaded_state_dict=state) or {}).get("distrib_optim_sharding_type")
    if changed and sharding == "dp_reshardable":
        raise LionError(
            f"{', '.join(changed)}: the optimizer state in {load_dir} is in Megatron's default format, dp_reshardable, "
            f"which can change only the data-parallel size. Resume once in the old layout with {SAVE_WITH}: what it "
            "saves then loads in any layout. Or load only the weights (--no-load-optim)"
        )


def _has_experts_apart(args: Any) -> bool:
    return (getattr(args, "expert_model_parallel_size", None) or 1) > 1


def refuse_other_shards(args: Any) -> None:
    """Raise LionError if a legacy checkpoint has other model-parallel shards than this run's ranks would open.

    Megatron 0.19.2 exits with status 0 on a rank that finds no file (checkpointing 1731).
    """
    from megatron.training.checkpointing import checkpoint_exists, get_load_checkpoint_path_by_args

    if not (hasattr(args, "data_parallel_size") and args.load and checkpoint_exists(args.load)):
        return
    found = {shard.name for shard in Path(get_load_checkpoint_path_by_args(args)).glob("mp_rank_*")}
    expected = _legacy_shards(args)
    if found and found != expected:
        raise LionError(
            f"{args.load} is in the legacy format (--ckpt-format torch), in which TP and PP cannot change: it has "
            f"{', '.join(sorted(found))}, and this run reads {', '.join(sorted(expected))}. Resume once in the old "
            f"layout with --ckpt-format torch_dist {SAVE_WITH}: what it saves then loads in any layout"
        )


def _legacy_shards(args: Any) -> set[str]:
    """The folders of the legacy format that this run's ranks read."""
    from megatron.training.checkpointing import get_checkpoint_name

    tensor, pipeline = range(args.tensor_model_parallel_size), range(args.pipeline_model_parallel_size)
    ranks = itertools.product(tensor, pipeline, range(args.expert_model_parallel_size))
    paths = (get_checkpoint_name("", 0, tensor_rank=t, pipeline_rank=p, expert_rank=e) for t, p, e in ranks)
    return {Path(path).parent.name for path in paths}
