"""Checks around the function with which Megatron first reads a checkpoint, on every rank."""

from collections.abc import Callable
from typing import Any

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
        if request and _asks_lion_for_adams_state(request, args):
            kwargs["sharded_state_dict"] = fsdp_dtensor.ask_for_adams_state(request, args.lion_init_from)
        with fsdp_dtensor.records_checked():
            loaded = stock(load_dir, args, *rest, **kwargs)
        state, path = loaded[0] or {}, loaded[1]
        saved_args = state.get("args")
        is_read_twice = request is not None  # and was checked the first time
        if saved_args is not None and ownership.loads_state(saved_args, args) and not is_read_twice:
            moments = formats.moments(state, path)
            ownership.refuse_another_optimizers_state(load_dir, saved_args, args, moments)
            if is_lion:
                formats.refuse_another_layout(load_dir, state, saved_args, args)
                group_settings.refuse_other_rates(saved_args, args)
    return loaded


def _asks_lion_for_adams_state(request: dict[str, Any], args: Any) -> bool:
    """Whether ``request`` is for Lion's state, from an ``fsdp_dtensor`` checkpoint that has Adam's."""
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    if args.optimizer != "lion" or args.ckpt_format != formats.FSDP_FORMAT or not args.lion_init_from:
        return False
    return "optimizer" in request and "exp_avg_sq" in formats.moments({}, get_load_checkpoint_path_by_args(args))


TRAINING = (
    compat.wrap(
        "megatron.training.checkpointing:_load_base_checkpoint",
        load_base_checkpoint,
        parameters=("load_dir", "args", "rank0", "sharded_state_dict"),
    ),
)
