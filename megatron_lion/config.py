"""User-facing options: every default and every check. Does not import torch, so that an error message comes at once."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_lion.nearest import did_you_mean

CHEN_BETAS = (0.9, 0.99)  # Chen et al. (2023), the defaults of plain Lion
LANGUAGE_MODEL_BETAS = (0.9, 0.95)
KERNELS = ("auto", "reference", "foreach", "fused")
MOMENTUM_INITS = ("zero", "gradient")
MOMENTUM_DTYPES = ("fp32", "bf16", "int8")
MASTER_WEIGHTS = ("fp32", "remainder")
GATHERS = ("params", "signs")
REDUCES = ("stock", "int8", "int4", "ternary")
ERROR_FEEDBACKS = ("int8", "bf16", "none")
INITS_FROM = ("adam", "fresh")

# Lion's published rates for language models (docs/coming-from-adamw.md, section 4): up to 2e-3 with weight decays from
# 0.6, and up to 3e-4 with AdamW's usual weight decays. Others give a warning, not an error. AdamW's go up to 8e-3.
LOWEST_LR, HIGHEST_LR, HIGHEST_ADAMW_LR = 1e-5, 2e-3, 8e-3
ADAMW_LIKE_LR, ADAMW_LIKE_WEIGHT_DECAY = 3e-4, 0.2


class LionError(ValueError):
    """An unsupported request. The message has the value, the valid values, and what to do."""


def _number(value: Any) -> float:
    """``value`` as a float, or NaN. Text is not a number: Megatron would use it unchanged and fail later."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def check_betas(betas: tuple[float, float], names: tuple[str, str] = ("beta1", "beta2")) -> tuple[float, float]:
    """Return ``betas`` as two floats in [0, 1), or raise :class:`LionError` calling them by ``names``."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise LionError(f"betas must be two numbers such as {CHEN_BETAS}, got {betas!r}") from None
    return _check_beta(names[0], beta1, "0.9"), _check_beta(names[1], beta2, "0.95 to 0.99")


def _check_beta(name: str, value: float, usual: str) -> float:
    beta = _number(value)
    if not 0.0 <= beta < 1.0:
        shown = repr(value) if math.isnan(beta) else f"{beta:g}"
        raise LionError(f"{name} must be in [0, 1), got {shown}; the usual value is {usual}")
    return beta


def check_non_negative(name: str, value: float) -> float:
    """Return ``value`` as a finite float >= 0, or raise :class:`LionError` naming ``name``."""
    number = _number(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise LionError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def check_count(name: str, value: int, least: int, unit: str) -> None:
    """Raise :class:`LionError` naming ``name`` unless ``value`` is a whole number >= ``least``."""
    try:
        enough = operator.index(value) >= least
    except TypeError:
        enough = False
    if not enough:
        raise LionError(f"{name} must be >= {least} {unit}, got {value!r}")


def check_switch(name: str, value: bool) -> None:
    """Raise :class:`LionError` naming ``name`` unless ``value`` is True or False: the text "false" would be true."""
    if not isinstance(value, bool):
        raise LionError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: str, valid: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``valid``, or raise :class:`LionError` with the nearest one."""
    valid = tuple(valid)
    if value not in valid:
        raise LionError(f"{name} {value!r} is unknown: {did_you_mean(str(value), valid)}")
    return value


def check_data_prefix(name: str, prefix: str) -> None:
    """Raise :class:`LionError` naming ``name`` if ``prefix`` is a file of a Megatron data set, not what both share."""
    if prefix.endswith((".bin", ".idx")) and not Path(f"{prefix}.bin").exists():
        raise LionError(
            f"{name} {prefix} names one of the two files of a data set: use {prefix[:-4]}. Megatron adds .bin and .idx"
        )


def check_rates(lr: float | None, weight_decay: float, min_lr: float | None = None) -> None:
    """Raise :class:`LionError` for learning rates or a weight decay that Lion cannot train with."""
    if lr is None:
        raise LionError("--optimizer lion needs --lr, 3 to 10 times lower than AdamW's (docs/coming-from-adamw.md)")
    check_non_negative("--lr", lr)
    check_non_negative("--weight-decay", weight_decay)
    if min_lr is not None and check_non_negative("--min-lr", min_lr) > lr:
        raise LionError(f"--min-lr {min_lr:g} is greater than --lr {lr:g}; lower it with Lion's --lr")


def warning_about(lr: float, weight_decay: float) -> str | None:
    """A sentence if the rates are AdamW's or higher, and outside the published ranges of Lion's, else None."""
    if lr <= ADAMW_LIKE_LR or (lr <= HIGHEST_LR and weight_decay > ADAMW_LIKE_WEIGHT_DECAY):
        return None
    if lr > HIGHEST_ADAMW_LR:
        return (
            f"--lr {lr:g} is far above Lion's published rates for language models, {LOWEST_LR:g} to {HIGHEST_LR:g}. "
            "Lion moves every element by the whole learning rate; see docs/coming-from-adamw.md"
        )
    return (
        f"--lr {lr:g} with --weight-decay {weight_decay:g} looks like AdamW's. Lion moves every element by the whole "
        f"learning rate, so it usually needs a 3 to 10 times lower one ({lr / 10:g} to {lr / 3:g}) with a 3 to 10 "
        "times higher --weight-decay; see docs/coming-from-adamw.md"
    )


def betas_or_default(beta1: float | None, beta2: float | None) -> tuple[float, float]:
    """The two betas, with Lion's default for each one that is None."""
    default1, default2 = LionOptions.betas
    return default1 if beta1 is None else beta1, default2 if beta2 is None else beta2


@dataclass(frozen=True, kw_only=True)
class LionOptions:
    """Options of ``--optimizer lion``, checked. Made once, where the optimizer is built, and passed on from there.

    Under Megatron each option is a field of ``OptimizerConfig`` and, on the command line, a flag. Its name there is
    ``lion_`` plus the name here; the betas are ``lion_beta1`` and ``lion_beta2``.
    """

    betas: tuple[float, float] = LANGUAGE_MODEL_BETAS
    """(beta1, beta2), each in [0, 1)"""
    kernel: str = "auto"
    """how a step is computed, one of ``KERNELS``; all give the same bits"""
    momentum_dtype: str = "fp32"
    """how the momentum is stored, one of ``MOMENTUM_DTYPES``"""
    master_weights: str = "fp32"
    """how the fp32 master of a bf16 parameter is stored, one of ``MASTER_WEIGHTS``"""
    gather: str = "params"
    """what data-parallel ranks send each other after a step, one of ``GATHERS``; both give the same bits"""
    gather_refresh: int = 0
    """with ``gather="signs"``: send the parameters after every this many steps; 0 for never"""
    reduce: str = "stock"
    """how data-parallel ranks send each other gradients, one of ``REDUCES``. All but "stock" are lossy, and
    experimental"""
    error_feedback: str = "int8"
    """with another ``reduce``: how a rank stores its residual, one of ``ERROR_FEEDBACKS``"""
    fast_norm: bool = False
    """compute Megatron's gradient norm in one pass of this package's CPU kernel; its last bits may differ"""
    init_from: str | None = None
    """what Lion's momentum starts from if the checkpoint is Adam's, one of ``INITS_FROM``. None: refused"""
    rates_from_run: bool = False
    """on loading, keep this run's learning rates and weight decay; False takes the checkpoint's, as Megatron does"""
    saves_stacks: bool = False
    """checkpoints stack the layers of a parameter, which needs all of its layers trained or none"""

    def __post_init__(self) -> None:
        check_betas(self.betas, names=("--lion-beta1", "--lion-beta2"))
        check_choice("--lion-kernel", self.kernel, KERNELS)
        check_choice("--lion-momentum-dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        check_choice("--lion-master-weights", self.master_weights, MASTER_WEIGHTS)
        check_choice("--lion-gather", self.gather, GATHERS)
        check_count("--lion-gather-refresh", self.gather_refresh, 0, "steps (0 is never)")
        if self.gather_refresh and self.gather != "signs":
            raise LionError("--lion-gather-refresh has no effect without --lion-gather signs: add it, or remove this")
        check_choice("--lion-reduce", self.reduce, REDUCES)
        check_choice("--lion-error-feedback", self.error_feedback, ERROR_FEEDBACKS)
        if self.error_feedback != LionOptions.error_feedback and self.reduce == "stock":
            raise LionError(
                f"--lion-error-feedback {self.error_feedback} has no effect without --lion-reduce int8, int4 or "
                "ternary: add it, or remove this"
            )
        if self.init_from is not None:
            check_choice("--lion-init-from", self.init_from, INITS_FROM)
        for name in ("fast_norm", "rates_from_run", "saves_stacks"):
            check_switch(f"--lion-{name.replace('_', '-')}", getattr(self, name))

    @classmethod
    def from_config(cls, config: Any) -> "LionOptions":
        """The options in ``config``: Megatron's ``OptimizerConfig``, or its parsed command line, which has the same
        names. Raises LionError for options that are unknown or that contradict other settings of ``config``."""
        momentum_dtype, master_weights = _precision(config)
        options = cls(
            betas=betas_or_default(config.lion_beta1, config.lion_beta2),
            kernel=config.lion_kernel,
            momentum_dtype=momentum_dtype,
            master_weights=master_weights,
            gather=config.lion_gather,
            gather_refresh=config.lion_gather_refresh,
            reduce=config.lion_reduce,
            error_feedback=config.lion_error_feedback,
            fast_norm=config.lion_fast_norm,
            init_from=config.lion_init_from,
            rates_from_run=config.lion_rates_from_run,
            saves_stacks=config.lion_saves_stacks,
        )
        options._check_against(config)
        return options

    def write_to(self, config: Any) -> None:
        """Set every option in ``config``, in place, so that it says what is used."""
        config.lion_beta1, config.lion_beta2 = self.betas
        for option in fields(self):
            if option.name != "betas":
                setattr(config, f"lion_{option.name}", getattr(self, option.name))

    def _check_against(self, config: Any) -> None:
        offload = config.optimizer_cpu_offload
        needs_sharding = {
            "--optimizer-cpu-offload": offload,
            f"--lion-momentum-dtype {self.momentum_dtype}": self.momentum_dtype != "fp32",
            f"--lion-master-weights {self.master_weights}": self.master_weights != "fp32",
            f"--lion-gather {self.gather}": self.gather != "params",
            f"--lion-reduce {self.reduce}": self.reduce != "stock",
            "--use-precision-aware-optimizer": config.use_precision_aware_optimizer,
            "--main-grads-dtype bf16": dtype_name(config.main_grads_dtype) != "fp32",
        }
        asked = [flag for flag, is_asked in needs_sharding.items() if is_asked]
        if asked and not config.use_distributed_optimizer:
            raise LionError(f"{asked[0]} needs --use-distributed-optimizer (also on one rank): add it")
        if offload and not (config.bf16 or config.fp16):
            raise LionError(
                "--optimizer-cpu-offload is not supported in fp32: Megatron's optimizer for it refuses shards of fp32 "
                "parameters. Add --bf16, or remove the flag"
            )
        if offload and self.gather == "signs":
            raise LionError(
                "--lion-gather signs is not supported with --optimizer-cpu-offload: its steps on the CPU leave no "
                "signs. Remove one of them"
            )
        if offload and self.reduce != "stock":
            raise LionError(
                f"--lion-reduce {self.reduce} is not supported with --optimizer-cpu-offload: it cannot add to the "
                "momentum there. Remove one of them"
            )
        if self.gather == "signs" and self.kernel == "fused" and config.fp16:
            raise LionError(
                "--lion-gather signs is not supported with --lion-kernel fused and --fp16: the fused kernel does not "
                "write fp16 parameters. Use --lion-kernel auto"
            )
        if offload and self.is_compact:
            raise LionError(
                f"--lion-momentum-dtype {self.momentum_dtype} with --lion-master-weights {self.master_weights} is not "
                "supported with --optimizer-cpu-offload, which keeps both in fp32. Use fp32 for both, or remove "
                "--optimizer-cpu-offload: compact state may be enough without it"
            )
        if self.master_weights == "remainder" and not config.bf16:
            raise LionError(
                "--lion-master-weights remainder stores the bits that a bf16 parameter lacks of its fp32 master, but "
                "this run has no bf16 parameters. Add --bf16, or use --lion-master-weights fp32"
            )

    @property
    def is_compact(self) -> bool:
        """Whether state is kept in fewer bits than fp32."""
        return (self.momentum_dtype, self.master_weights) != ("fp32", "fp32")


def dtype_name(dtype: Any) -> str:
    """``fp32``, ``bf16``, ``fp16`` or ``fp8`` for a torch dtype, or for a string that already is one of these."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "fp8"}.get(name, name)


def _precision(config: Any) -> tuple[str, str]:
    """``momentum_dtype`` and ``master_weights``: Lion's settings, or what Megatron's precision-aware ones mean."""
    exp_avg, main_params = dtype_name(config.exp_avg_dtype), dtype_name(config.main_params_dtype)
    aware = config.use_precision_aware_optimizer or config.optimizer_cpu_offload
    momentum_dtype, master_weights = config.lion_momentum_dtype, config.lion_master_weights
    if aware and exp_avg not in ("fp32", "bf16"):
        raise LionError(
            f"--exp-avg-dtype {exp_avg} is not supported with --optimizer lion: use fp32 or bf16, or "
            "--lion-momentum-dtype int8 instead"
        )
    if main_params != "fp32":
        raise LionError(
            f"--main-params-dtype {main_params} is not supported with --optimizer lion: its master weights have fp32 "
            "values. Remove it, or use --lion-master-weights remainder to store 16 bits of them"
        )
    if momentum_dtype is None:
        momentum_dtype = exp_avg if aware else LionOptions.momentum_dtype
    elif aware and exp_avg not in ("fp32", momentum_dtype):
        raise LionError(
            f"--lion-momentum-dtype {momentum_dtype} contradicts --exp-avg-dtype {exp_avg}: remove one of them"
        )
    if master_weights is None:
        keeps_remainders = getattr(config, "store_param_remainders", True)  # the command line has no such flag
        as_remainders = aware and config.bf16 and keeps_remainders and not config.optimizer_cpu_offload
        master_weights = "remainder" if as_remainders else LionOptions.master_weights
    return momentum_dtype, master_weights


ALL_BATCHES: Literal["all"] = "all"


@dataclass(frozen=True, kw_only=True)
class NormRatioOptions:
    """When and how the norm ratio is measured during training, checked."""

    interval: int = 0
    """a round after every this many iterations; 0 for none"""
    batches: int | Literal["all"] = 100
    """global batches of a round; ``all``: those of the whole training split, each sample once"""
    at_start: bool = False
    """a round before the first iteration too, if the file has none yet"""
    file: str = "norm_ratio.jsonl"
    """where the rounds are written"""

    def __post_init__(self) -> None:
        check_count("--norm-ratio-interval", self.interval, 0, "iterations (0 is off)")
        if self.batches != ALL_BATCHES:
            unit = f"global batches, or {ALL_BATCHES!r} (the paper has 100)"
            check_count("--norm-ratio-batches", self.batches, 1, unit)
        check_switch("--norm-ratio-at-start", self.at_start)

    @property
    def is_on(self) -> bool:
        """Whether there will be any round."""
        return self.interval > 0 or self.at_start
