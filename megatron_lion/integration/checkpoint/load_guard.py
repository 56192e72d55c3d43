"""Checks around the function with which Megatron first reads a checkpoint, on every rank."""

from collections.abc import Callable
from typing import Any

from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats, group_settings, integrity, ownership


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
        loaded = stock(load_dir, args, *rest, **kwargs)
        state, path = loaded[0] or {}, loaded[1]
        saved_args = state.get("args")
        is_read_twice = kwargs.get("sharded_state_dict") is not None  # and was checked the first time
        if saved_args is not None and ownership.loads_state(saved_args, args) and not is_read_twice:
            moments = formats.moments(state, path)
            ownership.refuse_another_optimizers_state(load_dir, saved_args, args, moments)
            if is_lion:
                formats.refuse_another_layout(load_dir, state, saved_args, args)
                group_settings.refuse_other_rates(saved_args, args)
    return loaded


TRAINING = (
    compat.wrap(
        "megatron.training.checkpointing:_load_base_checkpoint",
        load_base_checkpoint,
        parameters=("load_dir", "args", "rank0", "sharded_state_dict"),
    ),
)
