"""Resuming: use the command line's learning rates unless told to keep the checkpoint's.

Megatron looks for the saved group of each parameter group and takes all settings of that one. Up to 0.18 it compares
only multipliers and kind: it silently ignored a new ``--lr``, although ``--override-opt_param-scheduler`` asks for it,
and two groups that differ in their rates both got the last one's (0.18.2: distrib_optimizer 908). From 0.19 on it
compares rates too, and finds no group for a new ``--lr``.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.storage import LION_GROUP_KEYS

RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
# Settings of a weight decay that changes during a run, over --train-iters.
SCHEDULED_DECAY = ("start_weight_decay", "end_weight_decay", "train_iters")
WEIGHT_DECAY = ("weight_decay", "weight_decay_incr_style", *SCHEDULED_DECAY)

NO_SUCH_GROUP = (
    "no parameter group in the checkpoint has this run's learning rates and multipliers: resume with the --lr, "
    "--min-lr and --decoupled-lr that it was saved with, use this run's (--override-opt_param-scheduler; in your own "
    "loop lion_rates_from_run=True in OptimizerConfig), or load only the weights (--no-load-optim)"
)


def refuse_other_rates(saved_args: Any, args: Any) -> None:
    """Raise LionError if the rates of this run and of its checkpoint differ and no flag says which to use.

    Also if the run uses the checkpoint's rates and sets another weight decay: Megatron would make the first step with
    the command line's (OptimizerParamScheduler.load_state_dict sets the groups before it reads the decay).
    """
    if args.override_opt_param_scheduler:
        return
    if args.use_checkpoint_opt_param_scheduler:
        if changes := _changes(saved_args, args, WEIGHT_DECAY):
            raise LionError(
                f"--use-checkpoint-opt_param-scheduler is set, but this run changes {changes}, which Megatron would "
                "use for its first step. Use the checkpoint's values, or the command line's for all "
                "(--override-opt_param-scheduler)"
            )
    elif changes := _changes(saved_args, args, (*RATES, *WEIGHT_DECAY)):
        raise LionError(
            f"the schedule continues from the checkpoint's step, but this run changes {changes}: add "
            "--override-opt_param-scheduler to use the command line's values, or use the checkpoint's"
        )


def _changes(saved_args: Any, args: Any, names: tuple[str, ...]) -> str:
    """Which of the arguments differ, in words."""
    styles = {saved_args.weight_decay_incr_style, args.weight_decay_incr_style}
    unused = SCHEDULED_DECAY if styles == {"constant"} else ("weight_decay",) if "constant" not in styles else ()
    return ", ".join(
        f"--{name.replace('_', '-')} {getattr(saved_args, name)} to {getattr(args, name)}"
        for name in names
        if name not in unused and hasattr(saved_args, name) and getattr(saved_args, name) != getattr(args, name)
    )


class GroupSettings:
    """The settings, except betas, of a chain's parameter groups when it was built."""

    def __init__(self, sub_optimizers: list[Any]) -> None:
        self._optimizers = [
            sub_optimizer.optimizer for sub_optimizer in sub_optimizers if sub_optimizer.optimizer is not None
        ]
        self._settings = [_settings(group) for group in self._groups()]

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The current groups: a load replaces them."""
        return (group for optimizer in self._optimizers for group in optimizer.param_groups)

    def set_again(self) -> None:
        """Restore each group's settings: groups that are alike for Megatron all got those of one of them."""
        for group, settings in zip(self._groups(), self._settings, strict=True):
            group.update(settings)


@contextlib.contextmanager
def kept(own: GroupSettings, sub_optimizers: list[Any], state_dict: Any, *, from_run: bool) -> Iterator[Any]:
    """Around a load: yields ``state_dict`` with this run's group settings, by which Megatron finds each saved group.

    Betas stay the saved ones, because the optimizer handles them. Before Megatron reads a checkpoint it also loads the
    state of each sub-optimizer into itself, which changes its settings, so they are restored first. Without
    ``from_run`` everything is left to Megatron.
    """
    if not from_run:
        yield state_dict
        return
    own.set_again()
    yield _with_own_settings(sub_optimizers, state_dict)
    own.set_again()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "betas")}


def _with_own_settings(sub_optimizers: list[Any], state_dict: Any) -> Any:
    """``state_dict`` with the group settings of ``sub_optimizers``, or ``state_dict`` itself if it is not Lion's."""
    is_one = len(sub_optimizers) == 1
    # Megatron sorts the keys of a dictionary of several.
    states = [state_dict] if is_one else [state for _, state in sorted(_items(state_dict))]
    if len(states) != len(sub_optimizers) or not all(_is_lions(state) for state in states):
        return state_dict
    replaced = [
        _of_sub_optimizer(sub_optimizer, state) for sub_optimizer, state in zip(sub_optimizers, states, strict=True)
    ]
    return replaced[0] if is_one else replaced


def _items(state_dict: Any) -> Any:
    return state_dict.items() if isinstance(state_dict, dict) else enumerate(state_dict)


def _is_lions(state: dict[str, Any]) -> bool:
    return all(group.keys() >= LION_GROUP_KEYS for group in state.get("optimizer", state).get("param_groups", []))


def _of_sub_optimizer(sub_optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    inner = state.get("optimizer", state)  # the fp32 optimizer's state has no further level
    saved = inner.get("param_groups")
    if not saved or sub_optimizer.optimizer is None:
        return state
    own = [_settings(group) | {"betas": saved[0]["betas"]} for group in sub_optimizer.optimizer.param_groups]
    if any("params" in group for group in saved):  # by position, as in Megatron. The distributed optimizer saves none
        if len(own) != len(saved):
            return state  # Megatron reports this
        own = [{**group, "params": other["params"]} for group, other in zip(own, saved, strict=True)]
    inner = {**inner, "param_groups": own}
    return {**state, "optimizer": inner} if "optimizer" in state else inner
