"""Whose learning rates a resumed run has: its command line's, unless it asks for the checkpoint's.

Megatron looks for the saved group of each of its parameter groups and takes that one's settings whole. Up to 0.18 it
looks by multipliers and kind alone: a new ``--lr`` was then ignored without a word, though
``--override-opt_param-scheduler`` asks for it, and of two groups that differ in their rates both got the last one's
(0.18.2: distrib_optimizer 908). From 0.19 on it looks by rates too, and found none for a new ``--lr``.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_lion.config import LionError
from megatron_lion.storage import LION_GROUP_KEYS

# Set on the optimizer's configuration where the run's own settings count. A script that uses megatron.core alone, and
# may change groups by itself, has not got it: there the checkpoint's are taken, as Megatron has it.
FROM_RUN = "lion_group_settings_from_run"
RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
# Of a weight decay that changes while a run trains, over --train-iters.
SCHEDULED_DECAY = ("start_weight_decay", "end_weight_decay", "train_iters")
WEIGHT_DECAY = ("weight_decay", "weight_decay_incr_style", *SCHEDULED_DECAY)

NO_SUCH_GROUP = (
    "no parameter group in the checkpoint has this run's learning rates and multipliers: resume with the --lr, "
    "--min-lr and --decoupled-lr that it was saved with, take the command line's (--override-opt_param-scheduler), or "
    "load the weights alone (--no-load-optim)"
)


def carry(args: Any, config: Any) -> None:
    """Tell the optimizer's configuration whose settings the command line asks for."""
    setattr(config, FROM_RUN, not args.use_checkpoint_opt_param_scheduler)


def refuse_other_rates(saved_args: Any, args: Any) -> None:
    """Raise LionError where a run has other rates than its checkpoint and says of neither that they are to be taken.

    Also where it takes the checkpoint's, but with another weight decay: Megatron makes the first step with the command
    line's (OptimizerParamScheduler.load_state_dict sets the groups before it reads the decay).
    """
    if args.override_opt_param_scheduler:
        return
    if args.use_checkpoint_opt_param_scheduler:
        if changes := _changes(saved_args, args, WEIGHT_DECAY):
            raise LionError(
                f"--use-checkpoint-opt_param-scheduler, and this run changes {changes}, which Megatron would use for "
                "its first step: give those of the checkpoint, or take the command line's values for all "
                "(--override-opt_param-scheduler)"
            )
    elif changes := _changes(saved_args, args, (*RATES, *WEIGHT_DECAY)):
        raise LionError(
            f"the schedule goes on from the checkpoint's step, and this run changes {changes}: add "
            "--override-opt_param-scheduler, which takes the command line's values, or give those of the checkpoint"
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
    """The settings of a chain's parameter groups as they were when it was built, but for betas."""

    def __init__(self, parts: list[Any]) -> None:
        self._optimizers = [part.optimizer for part in parts if part.optimizer is not None]
        self._settings = [_settings(group) for group in self._groups()]

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The groups that there are now: a load replaces them."""
        return (group for optimizer in self._optimizers for group in optimizer.param_groups)

    def set_again(self) -> None:
        """Give each group its own settings: those that look the same to Megatron got those of one of them."""
        for group, settings in zip(self._groups(), self._settings, strict=True):
            group.update(settings)


@contextlib.contextmanager
def kept(own: GroupSettings, parts: list[Any], state_dict: Any) -> Iterator[Any]:
    """Around a load: yields ``state_dict`` with the settings of ``parts``, for Megatron to find each group by.

    Betas stay the saved ones, of which the optimizer says what becomes of them. Megatron also loads the state of each
    of ``parts`` into itself before it reads a checkpoint, so their settings then are no longer their own. Where the
    settings are not to be the run's, all is left to Megatron.
    """
    if not all(getattr(part.config, FROM_RUN, False) for part in parts):
        yield state_dict
        return
    own.set_again()
    yield _with_own_settings(parts, state_dict)
    own.set_again()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "betas")}


def _with_own_settings(parts: list[Any], state_dict: Any) -> Any:
    """``state_dict`` with the settings of the groups of ``parts``; itself where it is to be loaded as it is."""
    is_one = len(parts) == 1
    # Megatron sorts the keys of a dictionary of several.
    states = [state_dict] if is_one else [state for _, state in sorted(_items(state_dict))]
    if len(states) != len(parts) or not all(_is_lions(state) for state in states):
        return state_dict
    replaced = [_of_part(part, state) for part, state in zip(parts, states, strict=True)]
    return replaced[0] if is_one else replaced


def _items(state_dict: Any) -> Any:
    return state_dict.items() if isinstance(state_dict, dict) else enumerate(state_dict)


def _is_lions(state: dict[str, Any]) -> bool:
    return all(group.keys() >= LION_GROUP_KEYS for group in state.get("optimizer", state).get("param_groups", []))


def _of_part(part: Any, state: dict[str, Any]) -> dict[str, Any]:
    inner = state.get("optimizer", state)  # of the fp32 optimizer it is all there is
    saved = inner.get("param_groups")
    if not saved or part.optimizer is None:
        return state
    own = [_settings(group) | {"betas": saved[0]["betas"]} for group in part.optimizer.param_groups]
    if any("params" in group for group in saved):  # by place, as Megatron has it; the distributed optimizer keeps none
        if len(own) != len(saved):
            return state  # Megatron says so
        own = [{**group, "params": other["params"]} for group, other in zip(own, saved, strict=True)]
    inner = {**inner, "param_groups": own}
    return {**state, "optimizer": inner} if "optimizer" in state else inner
