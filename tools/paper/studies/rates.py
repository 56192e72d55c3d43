"""The constants of (A1) and (A2) from the rounds of repeated runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.stats.writer import read_records
from tools.paper import theory

# What is measured of each optimizer: Lion's rate is in the l1 norm, with sqrt(d); SGD's in the l2 norm.
NORMS = {"lion": "l1", "sgd": "l2"}


def read_repeats(optimizer: str, paths: Sequence[Path]) -> dict[str, Any]:
    """The rounds of one optimizer's repeats: steps, d, and the norms, (repeats, records).

    Rounds before the first step are left out: the rates count from k = 1. Those of the vision study are exact: sums
    over the whole training set. Raises LionError where the repeats are not of one model at the same steps, as when one
    was cut short, or say that they are of another optimizer or of several learning rates, naming the file.
    """
    runs = {path: [record for record in read_records(path) if record["iteration"] > 0] for path in paths}
    shapes = {path: ([record["iteration"] for record in run], {r["d"] for r in run}) for path, run in runs.items()}
    first = max(shapes.values(), key=lambda shape: len(shape[0]))
    for path, (steps, sizes) in shapes.items():
        if len(sizes) > 1 or sizes != first[1]:
            raise LionError(f"{path} is of another model: d = {_listed(sizes)}, elsewhere {_listed(first[1])}")
        if steps != first[0]:
            raise LionError(
                f"{path} has rounds at steps {_listed(steps)}, another repeat at {_listed(first[0])}: was it cut "
                "short? Finish it, or leave it out"
            )
    key = NORMS[optimizer]
    _check_same(optimizer, runs)
    for path, run in runs.items():
        if any(record[norm] is None for record in run for norm in {key, "l2"}):
            raise LionError(f"{path} has a round whose {key} is not finite: leave that run out, it diverged")
    rounds = [record for run in runs.values() for record in run]
    return {
        "steps": first[0],
        "d": first[1].pop(),
        "norms": [[record[key] for record in run] for run in runs.values()],
        "l2_norms": [[record["l2"] for record in run] for run in runs.values()],
        "converged": sum(bool(record["converged"]) for record in rounds),
        "rounds": len(rounds),
        "exact": all(record.get("exact") or "epoch" in record for record in rounds),
        "lr": rounds[0].get("lr"),
    }


def _check_same(optimizer: str, runs: Mapping[Path, list[dict[str, Any]]]) -> None:
    """Whether what the rounds themselves say, those of the vision study, agrees. Raises LionError where not."""
    for path, run in runs.items():
        if others := {record.get("optimizer", optimizer) for record in run} - {optimizer}:
            raise LionError(f"{path} is of {others.pop()}, not of {optimizer}: give it under its own name")
    rates = {record.get("lr"): path for path, run in runs.items() for record in run}
    if len(rates) > 1:
        listed = ", ".join(f"{lr} ({path})" for lr, path in rates.items())
        raise LionError(f"repeats of {optimizer} have several learning rates: {listed}; give those of one")


def constants(repeats: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """c_LION and c_SGD, and both sides of (A1), (A2) at each step, from :func:`read_repeats` of each optimizer.

    ``l2_constant`` is either's in the l2 norm, as (A1) has it. As ||g||_1 <= sqrt(d) ||g||_2, a run's constant in (A2)
    is never above its own in (A1): that c_LION < c_SGD can come of the norms alone.
    """
    found: dict[str, Any] = {}
    for name, entry in repeats.items():
        norms, steps = torch.tensor(entry["norms"], dtype=torch.float64), entry["steps"]
        if name == "lion":
            constant = theory.lion_rate_constant(norms, entry["d"], steps=steps)
        else:
            constant = theory.sgd_rate_constant(norms, steps=steps)
        scale = entry["d"] ** 0.5 if name == "lion" else 1.0
        left = theory.running_mean(norms.mean(0)).tolist()
        right = [constant.value * scale * step**-0.25 for step in steps]
        in_l2 = theory.sgd_rate_constant(torch.tensor(entry["l2_norms"], dtype=torch.float64), steps=steps)
        row = {"constant": constant.value, "l2_constant": in_l2.value, "at_step": constant.at_step, "left": left}
        kept = {key: value for key, value in entry.items() if not key.endswith("norms")}
        found[name] = kept | row | {"right": right, "repeats": len(norms)}
    return found


def early_against_late(
    steps: Sequence[int], lion: Sequence[Sequence[float]], sgd: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """In how many seeds Lion's first value is below SGD's last, and from which step on Lion's is so in every seed.

    ``lion`` and ``sgd`` hold a seed's values in a row, one for each of ``steps``; lower is better.
    """
    last = [row[-1] for row in sgd]
    below = [all(row[at] < end for row, end in zip(lion, last, strict=True)) for at in range(len(steps))]
    since = next((step for at, step in enumerate(steps) if all(below[at:])), None)
    lower = sum(row[0] < end for row, end in zip(lion, last, strict=True))
    return {"lion_lower": lower, "seeds": len(last), "below_from": since}


def below_from(found: Mapping[str, Any]) -> str:
    """What :func:`early_against_late` says of the step, in words."""
    step = found["below_from"]
    return "in all of them at no step" if step is None else f"in all of them from step {step} on"


def trusted(entry: Mapping[str, Any]) -> str:
    """How many of the rounds behind a constant converged, in words; those of the vision study are exact."""
    return "exact" if entry.get("exact") else f"{entry['converged']} of {entry['rounds']}"


def rate_of(entry: Mapping[str, Any]) -> str:
    """The learning rate of the repeats, a dash where they do not tell it."""
    return f"{entry['lr']:g}" if entry.get("lr") else "-"


def _listed(numbers: Sequence[int] | set[int]) -> str:
    shown = [str(number) for number in sorted(numbers)]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]]) or "none"
