"""Lion's settings in a recipe, checked as the run itself checks them, so that they fail before a job is queued."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from megatron_lion.config import LionError, LionOptions

from . import extra_flags
from .recipes import Recipe

# Lion's options by their names in Megatron's arguments, with the values that have no effect with another optimizer.
OPTIONS: dict[str, Any] = dict(zip(("lion_beta1", "lion_beta2"), LionOptions.betas, strict=True)) | {
    f"lion_{option.name}": option.default for option in fields(LionOptions) if option.name != "betas"
}
# Other settings decide these two where a command line does not set them.
UNSET = {"lion_momentum_dtype": None, "lion_master_weights": None}
# Megatron's settings that Lion's depend on, and the defaults of its command line.
MEGATRON = {
    "bf16": False, "fp16": False, "use_distributed_optimizer": False, "optimizer_cpu_offload": False,
    "use_precision_aware_optimizer": False, "exp_avg_dtype": "fp32", "main_params_dtype": "fp32",
    "main_grads_dtype": "fp32",
}  # fmt: skip


def check(recipe: Recipe, extra: list[str]) -> None:
    """Raise LionError for settings of Lion that contradict others, or that another optimizer would ignore.

    ``extra`` are the flags after ``--`` that are not keys of a recipe.
    """
    given = {key.replace("-", "_"): value for key, value in recipe.settings.items()} | extra_flags.values(extra)
    if recipe["optimizer"] != "lion":
        _refuse_without_effect(recipe["optimizer"], given)
        return
    if given.get("use_megatron_fsdp"):
        given["use_distributed_optimizer"] = True  # as Megatron sets it
    defaults = OPTIONS | UNSET | MEGATRON
    LionOptions.from_config(SimpleNamespace(**{name: given.get(name, value) for name, value in defaults.items()}))


def _refuse_without_effect(optimizer: str, given: dict[str, Any]) -> None:
    for name, default in OPTIONS.items():
        if given.get(name, default) != default:
            raise LionError(
                f"{name.replace('_', '-')} {given[name]} has no effect with optimizer {optimizer}: remove it, or use a "
                "recipe with lion"
            )
