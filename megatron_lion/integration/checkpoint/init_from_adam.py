"""Lion that continues an Adam checkpoint: ``--lion-init-from``."""

import argparse
from typing import Any

import torch

from megatron_lion.config import INITS_FROM, LionError, LionOptions
from megatron_lion.integration import compat, console
from megatron_lion.integration.optimizer.repaired import RepairedDistributedOptimizer
from megatron_lion.storage import LION_GROUP_KEYS

# What Lion's momentum starts from.
MOMENTUM = {"adam": "Adam's exp_avg, bit for bit", "fresh": "zero"}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flag to Megatron's parser."""
    parser.add_argument(
        "--lion-init-from",
        metavar=f"{{{','.join(INITS_FROM)}}}",
        help="If --load has an Adam checkpoint, continue with its weights and Adam's momentum (adam), or zero momentum "
        "(fresh). Without it such a checkpoint is refused. No effect once the checkpoint is Lion's own.",
    )


def check(args: Any, options: LionOptions) -> None:
    """Raise LionError for a ``--lion-init-from`` that another flag contradicts."""
    asked = options.init_from
    if asked is None:
        return
    for flag in ("no_load_optim", "finetune"):
        if getattr(args, flag):
            raise LionError(
                f"--lion-init-from {asked} reads the optimizer state in the checkpoint, and "
                f"--{flag.replace('_', '-')} leaves it out: remove one of the two"
            )
    if not args.use_distributed_optimizer:
        raise LionError(
            f"--lion-init-from {asked} needs --use-distributed-optimizer, in this run and in the one that saved the "
            "checkpoint. Without it load only the weights (--no-load-optim)"
        )


class InitFromAdam(RepairedDistributedOptimizer):
    """A distributed optimizer around Lion that can load Adam's checkpoint, in any of Megatron's formats.

    From that state it takes the fp32 master weights and, with ``--lion-init-from adam``, ``exp_avg``: both are averages
    of past gradients, Adam's with (1 - beta1) and Lion's with (1 - beta2), so it is used unchanged; ``exp_avg_sq`` is
    not read. Parameter groups, with learning rates, betas and weight decay, stay those of this run. Later checkpoints
    are Lion's and load as such with any ``--lion-init-from``.
    """

    options: LionOptions  # set when the optimizer has been built
    _init_from: str | None = None

    @compat.overrides
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["optimizer"]["param_groups"]
        is_lions = all(group.keys() >= LION_GROUP_KEYS for group in groups)
        self._init_from = None if is_lions else self.options.init_from
        if self._init_from is not None:
            state_dict = {**state_dict, "optimizer": self.state_dict()["optimizer"]}
            console.say(f"continuing an Adam run: master weights kept, momentum {MOMENTUM[self._init_from]}")
        super().load_state_dict(state_dict)

    @compat.overrides
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        if self._init_from == "fresh":
            tensors = {**tensors, "exp_avg": torch.zeros_like(tensors["exp_avg"])}
        super()._set_main_param_and_optimizer_states(model_param, tensors)
