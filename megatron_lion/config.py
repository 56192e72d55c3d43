"""What a user may ask for, and every check of it. Imports nothing, so that a message never waits for torch."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

PAPER_BETAS = (0.9, 0.99)
LANGUAGE_MODEL_BETAS = (0.9, 0.95)
KERNELS = ("auto", "reference", "foreach", "fused")
MOMENTUM_INITS = ("zero", "gradient")
MOMENTUM_DTYPES = ("fp32", "bf16", "int8")
MASTER_WEIGHTS = ("fp32", "remainder")

# Where AdamW's rates for language models begin. Small models have been tuned to higher ones with Lion too
# (docs/coming-from-adamw.md has the sources), so what follows is a hint, not a refusal.
ADAMW_LIKE_LR = 3e-4


class LionError(ValueError):
    """A request that cannot be met. The message names the value, the valid ones, and what to do."""


def did_you_mean(value: str, valid: Iterable[str]) -> str:
    """A sentence naming the nearest valid name, then all of them: ``did you mean 'lion'? Valid: adam, lion, sgd``."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Valid: {', '.join(names)}"


def check_betas(betas: tuple[float, float], names: tuple[str, str] = ("beta1", "beta2")) -> tuple[float, float]:
    """Return ``betas`` as two floats in [0, 1), or raise :class:`LionError` calling them by ``names``."""
    try:
        beta1, beta2 = (float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise LionError(f"betas must be two numbers such as {PAPER_BETAS}, got {betas!r}") from None
    for name, beta, usual in ((names[0], beta1, "0.9"), (names[1], beta2, "0.95 to 0.99")):
        if not 0.0 <= beta < 1.0:
            raise LionError(f"{name} must lie in [0, 1), got {beta:g}; the usual value is {usual}")
    return beta1, beta2


def check_non_negative(name: str, value: float) -> float:
    """Return ``value`` as a finite float >= 0, or raise :class:`LionError` naming ``name``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0.0):
        raise LionError(f"{name} must be a finite number >= 0, got {value}")
    return number


def check_choice(name: str, value: str, valid: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``valid``, or raise :class:`LionError` with the nearest one."""
    valid = tuple(valid)
    if value not in valid:
        raise LionError(f"{name} {value!r} is unknown: {did_you_mean(str(value), valid)}")
    return value


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """What ``--optimizer lion`` was asked to be, checked.

    The learning rate and weight decay here are the run's base values; Megatron's scheduler sets each group's own.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float] = LANGUAGE_MODEL_BETAS
    kernel: str = "auto"
    momentum_dtype: str = "fp32"
    master_weights: str = "fp32"

    def __post_init__(self) -> None:
        check_non_negative("--lr", self.lr)
        check_non_negative("--weight-decay", self.weight_decay)
        check_betas(self.betas, names=("--lion-beta1", "--lion-beta2"))
        check_choice("--lion-kernel", self.kernel, KERNELS)
        check_choice("--lion-momentum-dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        check_choice("--lion-master-weights", self.master_weights, MASTER_WEIGHTS)

    @property
    def is_compact(self) -> bool:
        """Whether state is kept in fewer bits than fp32."""
        return (self.momentum_dtype, self.master_weights) != ("fp32", "fp32")

    @property
    def is_packed(self) -> bool:
        """Whether a number of the state is divided over two tensors."""
        return self.momentum_dtype == "int8" or self.master_weights == "remainder"

    @property
    def lr_warning(self) -> str | None:
        """A sentence where the learning rate looks like AdamW's, else None."""
        if self.lr < ADAMW_LIKE_LR:
            return None
        return (
            f"--lr {self.lr:g} looks like AdamW's. Lion moves every element by the whole learning rate, so it usually "
            f"wants a 3 to 10 times lower one ({self.lr / 10:g} to {self.lr / 3:g}) with a 3 to 10 times higher "
            "--weight-decay; see docs/coming-from-adamw.md"
        )


@dataclass(frozen=True, kw_only=True)
class NormRatioConfig:
    """When and how the norm ratio is measured during training, checked."""

    interval: int = 0
    """a round after every so many iterations; 0 for none"""
    batches: int = 100
    """global batches of a round"""
    at_start: bool = False
    """a round before the first iteration too, if the file has none yet"""
    file: str = "norm_ratio.jsonl"
    """where the rounds are written"""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise LionError(f"--norm-ratio-interval must be >= 0 iterations (0 is off), got {self.interval}")
        if self.batches < 1:
            raise LionError(f"--norm-ratio-batches must be >= 1 global batches, got {self.batches}; the paper has 100")

    @property
    def is_on(self) -> bool:
        """Whether there will be any round."""
        return self.interval > 0 or self.at_start
