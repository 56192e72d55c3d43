"""Whose optimizer state a checkpoint holds, asked before Megatron reads it, and who may go on with it.

Without this, a mix-up ends either in a list of missing keys or, where the names happen to fit, in training on another
optimizer's state. Two witnesses are heard: the arguments in the checkpoint, and the names of its tensors.
"""

from collections.abc import Callable
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.checkpoint import formats, group_settings
from megatron_lion.version import __version__

# Set on Megatron's arguments, which it saves in every checkpoint: tells our Lion's state from stock Megatron's.
MARK = "megatron_lion_version"
STOCK_LION = "stock Megatron's lion (its embeddings and 1-D parameters are on Adam)"
WEIGHTS_ALONE = (
    "To continue with the weights alone, add --no-load-optim (keeps the iteration) or --finetune (starts at iteration "
    "0 with a new schedule). Nothing was changed"
)


def mark(args: Any) -> None:
    """Let every checkpoint of this run say that its optimizer state is this package's."""
    setattr(args, MARK, __version__)


def load_base_checkpoint(stock: Callable[..., Any], load_dir: str, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Around the function with which Megatron first reads a checkpoint's arguments, on every rank."""
    is_lion = args.optimizer == "lion"
    if is_lion:
        formats.refuse_other_shards(args)
    loaded = stock(load_dir, args, *rest, **kwargs)
    state, path = loaded[0] or {}, loaded[1]
    saved_args = state.get("args")
    is_read_twice = kwargs.get("sharded_state_dict") is not None  # and was judged the first time
    if saved_args is not None and loads_state(saved_args, args) and not is_read_twice:
        refuse_another_optimizers_state(load_dir, saved_args, args, formats.moments(state, path))
        if is_lion:
            formats.refuse_another_layout(load_dir, state, saved_args, args)
            group_settings.refuse_other_rates(saved_args, args)
    return loaded


def loads_state(saved_args: Any, args: Any) -> bool:
    """Whether Megatron will load optimizer state, not the weights alone."""
    return not (args.finetune or args.no_load_optim or getattr(saved_args, "no_save_optim", False))


def refuse_another_optimizers_state(
    load_dir: str, saved_args: Any, args: Any, found: frozenset[str] = frozenset()
) -> None:
    """Raise LionError where optimizer state is about to be loaded that is not the running optimizer's.

    Only a mix-up with Lion on one side is judged here; any other pair is Megatron's own matter.
    """
    running, said = args.optimizer, getattr(saved_args, "optimizer", None)
    writer = written_by(saved_args, found)
    if not loads_state(saved_args, args) or "lion" not in (writer, running, said) or writer == running:
        return
    if running == "lion" and writer == "adam":
        if args.lion_init_from:
            _require_lions_schedule(saved_args, args)
            return
        ways = (
            "--lion-init-from adam continues with its weights, iteration and schedule and takes Adam's exp_avg for "
            "Lion's momentum, --lion-init-from fresh the same with momentum zero. "
        )
    else:
        ways = ""
    raise LionError(
        f"the optimizer state in {load_dir} was written by {writer}, and this run's optimizer is {running}. "
        f"{ways}{WEIGHTS_ALONE}"
    )


def written_by(saved_args: Any, found: frozenset[str]) -> str:
    """Whose state it is: ``lion`` is this package's. The tensors are believed before the arguments."""
    said = str(getattr(saved_args, "optimizer", None))
    if said == "lion" and not hasattr(saved_args, MARK):
        return STOCK_LION
    if "exp_avg_sq" in found and said == "lion":
        return "adam"
    if "momentum_buffer" in found and said == "lion":
        return "sgd"
    if found == {"exp_avg"} and said in ("adam", "sgd"):
        return "lion"
    return said


def _require_lions_schedule(saved_args: Any, args: Any) -> None:
    """Refuse to train Lion at Adam's rates, and say which flag Megatron asks for where the rates differ."""
    if args.use_checkpoint_opt_param_scheduler:
        raise LionError(
            "--use-checkpoint-opt_param-scheduler would train Lion at Adam's learning rates: give Lion's --lr and "
            "--min-lr with --override-opt_param-scheduler"
        )
    group_settings.refuse_other_rates(saved_args, args)


TRAINING = (
    compat.wrap(
        "megatron.training.checkpointing:_load_base_checkpoint",
        load_base_checkpoint,
        parameters=("load_dir", "args", "rank0", "sharded_state_dict"),
    ),
)
