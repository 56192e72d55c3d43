"""Checks around the function with which Megatron first reads a checkpoint, on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load

from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats, fsdp_dtensor, group_settings, integrity, ownership


def load_base_checkpoint(stock: Callable[..., Any], load_dir: str, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Check the files, let Megatron load, and refuse optimizer state that this run cannot use.

    Raises LionError if a file is damaged or missing, for another optimizer's state, for one in another layout, and for
    other learning rates.
    """
    is_lion = args.optimizer == "lion"
    with integrity.read_errors_named(load_dir, args):
        integrity.check_common_state(load_dir, args)
        if is_lion:
            formats.refuse_other_shards(args)
        request = kwargs.get("sharded_state_dict")
        is_first = request is None  # the command line and other common state
        if not is_first and _is_fsdp_read_at_once(args):
            path = _path(args)
            _check(load_dir, _common_state(path), path, args)
        if request and _asks_lion_for_adams_state(request, args):
            kwargs["sharded_state_dict"] = fsdp_dtensor.ask_for_adams_state(request, args.lion_init_from)
        with fsdp_dtensor.records_checked():
            loaded = stock(load_dir, args, *rest, **kwargs)
        if is_first:
            state, path = loaded[:2]
            _check(load_dir, state or _common_state(path), path, args)
    return loaded


def _check(load_dir: str, state: dict[str, Any], path: str, args: Any) -> None:
    """Raise LionError if this run cannot continue from the checkpoint at ``path``, which has the common ``state``."""
    saved_args = state.get("args")
    if saved_args is None or not ownership.loads_state(saved_args, args):
        return
    ownership.refuse_another_optimizers_state(load_dir, saved_args, args, formats.moments(state, path))
    if args.optimizer == "lion":
        formats.refuse_another_layout(load_dir, state, saved_args, args)
        group_settings.refuse_other_rates(saved_args, args)


def _is_fsdp_read_at_once(args: Any) -> bool:
    """Whether Megatron reads Megatron-FSDP's checkpoints without reading the saved command line first."""
    return args.ckpt_format == formats.FSDP_FORMAT and not compat.installed_traits().reads_fsdp_command_line_first


def _path(args: Any) -> str:
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    return str(get_load_checkpoint_path_by_args(args))


def _common_state(path: str | None) -> dict[str, Any]:
    """The saved command line in a checkpoint of several files, with which Megatron begins from 0.19 on.

    Empty for another checkpoint. Called on every rank, as torch gathers what ranks read.
    """
    from megatron.core import dist_checkpointing

    if not path or not (Path(path) / ".metadata").is_file():
        return {}
    if dist_checkpointing.check_is_distributed_checkpoint(path):
        return dict(dist_checkpointing.load_common_state_dict(path))
    state: dict[str, Any] = {"args": None}
    load(state, checkpoint_id=path)
    return state


def _asks_lion_for_adams_state(request: dict[str, Any], args: Any) -> bool:
    """Whether ``request`` is for Lion's state, from an ``fsdp_dtensor`` checkpoint that has Adam's."""
    if args.optimizer != "lion" or args.ckpt_format != formats.FSDP_FORMAT or not args.lion_init_from:
        return False
    return "optimizer" in request and "exp_avg_sq" in formats.moments({}, _path(args))


TRAINING = (
    compat.wrap(
        "megatron.training.checkpointing:_load_base_checkpoint",
        load_base_checkpoint,
        parameters=("load_dir", "args", "rank0", "sharded_state_dict"),
    ),
)
