"""One readable line for each step on the screen; log.txt keeps Megatron's."""

import datetime
import re

from . import estimates
from .recipes import Recipe

_STEP = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
_FIELD = re.compile(rf"\| +([a-z(][a-z()/ ]*): +({_NUMBER}) (?=\|)", re.IGNORECASE)
_MILLISECONDS = "elapsed time per iteration (ms)"


def readable(line: str, recipe: Recipe) -> str | None:
    """``line`` of Megatron's log as a step's loss, learning rate, norm, speed and remaining time, else None.

    TFLOP/s is for each GPU, by :func:`estimates.flops_per_step`. All values that Megatron calls a loss are shown. A
    step with a skipped update has none. Any line is accepted: a field without a number is left out.
    """
    if not (step := _STEP.search(line)):
        return None
    fields = {name: float(value) for name, value in _FIELD.findall(line)}
    if _MILLISECONDS not in fields:
        return None
    try:
        return _shown(int(step[1]), int(step[2]), fields, recipe)
    except (ValueError, ArithmeticError):  # numbers that no step has, such as a time of 0, nan or 1e300
        return None


def _shown(at: int, last: int, fields: dict[str, float], recipe: Recipe) -> str:
    seconds = fields[_MILLISECONDS] / 1000
    losses = [f"{name} {value:.4f}" for name, value in fields.items() if name.endswith("loss")]
    parts = [f"step {at}/{last}", *(losses or ["no loss: update skipped"])]
    if "learning rate" in fields:
        parts.append(f"lr {fields['learning rate']:.3g}")
    if "grad norm" in fields:
        parts.append(f"norm {fields['grad norm']:.3g}")
    parts += [
        f"{recipe['global-batch-size'] * recipe['seq-length'] / seconds:,.0f} tokens/s",
        f"{estimates.flops_per_step(recipe) / recipe.ranks / seconds / 1e12:.3g} TFLOP/s",
        f"{datetime.timedelta(seconds=round((last - at) * seconds))} left",
    ]
    return " | ".join(parts)
