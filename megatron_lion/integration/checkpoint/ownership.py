"""Check which optimizer wrote a checkpoint before Megatron loads it.

Without this, a mix-up ends either in a list of missing keys or, if the names happen to fit, in training on another
optimizer's state. Two sources are compared: the arguments in the checkpoint, and the names of its tensors.
"""

from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration.checkpoint import group_settings
from megatron_lion.version import __version__

# Set on Megatron's arguments, which it saves in every checkpoint: distinguishes our Lion's state from stock's.
MARK = "megatron_lion_version"
STOCK_LION = "stock Megatron's lion (its embeddings and 1-D parameters are on Adam)"
WEIGHTS_ALONE = (
    "To continue with only the weights, add --no-load-optim (keeps the iteration) or --finetune (starts at iteration "
    "0 with a new schedule). Nothing was changed"
)


def mark(args: Any) -> None:
    """Record in every checkpoint of this run that its optimizer state is this package's."""
    setattr(args, MARK, __version__)


def loads_state(saved_args: Any, args: Any) -> bool:
    """Whether Megatron will load optimizer state, not only the weights."""
    return not (args.finetune or args.no_load_optim or getattr(saved_args, "no_save_optim", False))


def refuse_another_optimizers_state(
    load_dir: str, saved_args: Any, args: Any, found: frozenset[str] = frozenset()
) -> None:
    """Raise LionError if the state in a checkpoint is another optimizer's than the running one's.

    Only if one of the two is Lion; Megatron handles any other pair.
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
    """The optimizer that wrote the state; ``lion`` is this package's. If the two sources differ, the tensors win."""
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
    """Raise LionError if Lion would train at Adam's rates, or if the rates differ and no flag says which to use."""
    if args.use_checkpoint_opt_param_scheduler:
        raise LionError(
            "--use-checkpoint-opt_param-scheduler would train Lion at Adam's learning rates: use Lion's --lr and "
            "--min-lr with --override-opt_param-scheduler"
        )
    group_settings.refuse_other_rates(saved_args, args)
