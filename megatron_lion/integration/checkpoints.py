"""Whose optimizer state a checkpoint holds, asked before Megatron reads it.

Without this, a mix-up ends either in a list of missing keys or, where the names happen to fit, in training on another
optimizer's state.
"""

import functools
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.version import __version__

# Set on Megatron's arguments, which it saves in every checkpoint: tells our Lion's state from stock Megatron's.
MARK = "megatron_lion_version"


def mark(args: Any) -> None:
    """Let every checkpoint of this run say that its optimizer state is this package's."""
    setattr(args, MARK, __version__)


def install() -> None:
    """Wrap the function with which Megatron first reads a checkpoint's arguments, on every rank."""
    import megatron.training.checkpointing as checkpointing

    stock_load = checkpointing._load_base_checkpoint

    @functools.wraps(stock_load)
    def _load_base_checkpoint(load_dir: str, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = stock_load(load_dir, args, *rest, **kwargs)
        saved_args = (loaded[0] or {}).get("args")
        if saved_args is not None:
            refuse_another_optimizers_state(load_dir, saved_args, args)
        return loaded

    compat.replace_everywhere(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)


def refuse_another_optimizers_state(load_dir: str, saved_args: Any, args: Any) -> None:
    """Raise LionError where optimizer state is about to be loaded that is not the running optimizer's.

    Only a mix-up with Lion on one side is judged here; any other pair is Megatron's own matter.
    """
    saved, running = getattr(saved_args, "optimizer", None), args.optimizer
    written_by = saved
    loads_state = not (args.finetune or args.no_load_optim or getattr(saved_args, "no_save_optim", False))
    if not loads_state or "lion" not in (saved, running):
        return
    if saved == running == "lion":
        if hasattr(saved_args, MARK):
            return
        written_by = "stock Megatron's lion (its embeddings and 1-D parameters are on Adam)"
    raise LionError(
        f"the optimizer state in {load_dir} was written by {written_by}, and this run's optimizer is {running}. To "
        "continue with the weights alone, add --no-load-optim (keeps the iteration) or --finetune (starts at iteration "
        "0 with a new schedule). Nothing was changed"
    )
