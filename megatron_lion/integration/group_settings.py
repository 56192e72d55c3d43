"""Whose learning rates a resumed run has: its command line's, unless it asks for the checkpoint's.

Megatron looks for the saved group of each of its parameter groups and takes that one's settings whole. Up to 0.18 it
looks by multipliers and kind alone: a new ``--lr`` was then ignored without a word, though
``--override-opt_param-scheduler`` asks for it, and of two groups that differ in their rates both got the last one's
(0.18.2: distrib_optimizer 908). From 0.19 on it looks by rates too, and found none for a new ``--lr``.
"""

from typing import Any

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.lion import LION_GROUP_KEYS

# Set on the optimizer's configuration where the run's own settings count. A script that uses megatron.core alone, and
# may change groups by itself, has not got it: there the checkpoint's are taken, as Megatron has it.
FROM_RUN = "lion_group_settings_from_run"
RATES = ("lr", "min_lr", "weight_decay", "decoupled_lr", "decoupled_min_lr")

NO_SUCH_GROUP = (
    "no parameter group in the checkpoint has this run's learning rates and multipliers: resume with the --lr, "
    "--min-lr and --decoupled-lr that it was saved with, take the command line's (--override-opt_param-scheduler), or "
    "load the weights alone (--no-load-optim)"
)


def carry(args: Any, config: Any) -> None:
    """Tell the optimizer's configuration whose settings the command line asks for."""
    setattr(config, FROM_RUN, not args.use_checkpoint_opt_param_scheduler)


def refuse_other_rates(saved_args: Any, args: Any) -> None:
    """Raise LionError where a run has other rates than its checkpoint and says of neither that they are to be taken."""
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    both = ", ".join(
        f"--{name.replace('_', '-')} {getattr(saved_args, name)} to {getattr(args, name)}"
        for name in RATES
        if hasattr(saved_args, name) and getattr(saved_args, name) != getattr(args, name)
    )
    if both:
        raise LionError(
            f"the schedule goes on from the checkpoint's step, and this run changes {both}: add "
            "--override-opt_param-scheduler, which takes the command line's values, or give those of the checkpoint"
        )


def with_own_settings(optimizer: Any, state_dict: Any) -> Any:
    """``state_dict`` of Megatron's chain ``optimizer`` with the chain's own group settings, but for betas."""
    parts = compat.parts_of(optimizer)
    if len(parts) == 1:
        return _of_part(parts[0], state_dict)
    states = dict(sorted(state_dict.items())) if isinstance(state_dict, dict) else dict(enumerate(state_dict))
    if len(states) != len(parts):
        return state_dict  # Megatron says so
    return {key: _of_part(part, state) for part, (key, state) in zip(parts, states.items(), strict=True)}


def _of_part(part: Any, state: dict[str, Any]) -> dict[str, Any]:
    inner = state.get("optimizer", state)  # of the fp32 optimizer it is all there is
    saved = inner.get("param_groups", [])
    if not (getattr(part.config, FROM_RUN, False) and saved and all(g.keys() >= LION_GROUP_KEYS for g in saved)):
        return state
    own = [{name: value for name, value in group.items() if name != "params"} for group in part.optimizer.param_groups]
    if any("params" in group for group in saved):  # by place, as Megatron has it; the distributed optimizer keeps none
        if len(own) != len(saved):
            return state
        own = [{**group, "params": other["params"]} for group, other in zip(own, saved, strict=True)]
    inner = {**inner, "param_groups": [{**group, "betas": saved[0]["betas"]} for group in own]}
    return {**state, "optimizer": inner} if "optimizer" in state else inner
