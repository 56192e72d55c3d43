"""One readable line for each step on the screen; log.txt keeps Megatron's."""

import datetime
import re

from . import estimates
from .recipes import Recipe

_STEP = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_FIELD = re.compile(r"\| +([a-zA-Z()/ ]+): +([-+.\dEenaif]+) (?=\|)")


def readable(line: str, recipe: Recipe) -> str | None:
    """``line`` of Megatron's log as a step's loss, learning rate, norm, speed and remaining time, else None.

    TFLOP/s is for each GPU, by :func:`estimates.flops_per_step`. All values that Megatron calls a loss are shown. A
    step with a skipped update has none.
    """
    step = _STEP.search(line)
    fields = {name: float(value) for name, value in _FIELD.findall(line)}
    milliseconds = fields.get("elapsed time per iteration (ms)")
    if not (step and milliseconds):
        return None
    at, last = int(step[1]), int(step[2])
    losses = [f"{name} {value:.4f}" for name, value in fields.items() if name.endswith("loss")]
    seconds = milliseconds / 1000
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
