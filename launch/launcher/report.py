"""The dry run: the resolved recipe with the source of each setting, what the run needs, and its command."""

from pathlib import Path

from megatron_lion.config import GATHERS, LionOptions, NormRatioOptions

from . import commands, estimates, extra_flags, recipe_checks
from .keys import TOPICS
from .recipes import Recipe

UTILIZATION = 0.4  # share of a GPU's peak that a run is assumed to reach


def report(recipe: Recipe, extra: list[str]) -> str:
    """The whole dry run as text. ``extra`` are the flags after ``--`` that are not keys of a recipe."""
    parts = [f"recipe {' '.join(recipe.names)}"]
    if recipe.notes:
        parts.append("\n".join(f"note: {note}" for note in recipe.notes))
    parts += [f"warning: {warning}" for warning in recipe_checks.warnings(recipe)]
    parts.append("sources in brackets: the first lines of the recipe's files in configs/ name them")
    parts += [_settings(recipe), _needs(recipe)]
    if extra:
        checked = "" if extra_flags.known_flags() else " (names not checked: Megatron is not installed here)"
        parts.append(f"further flags{checked}\n  {' '.join(extra)}")
    if missing := recipe_checks.missing_files(recipe):
        parts.append("missing or empty on this machine\n" + "\n".join(f"  {entry}" for entry in missing))
    parts.append(commands.printed(recipe, extra))
    return "\n\n".join(parts)


def _settings(recipe: Recipe) -> str:
    """Each topic with its settings: key, value, and the file that it comes from with that file's comment."""
    blocks = []
    for topic, keys in TOPICS.items():
        rows = [
            f"  {key:35} {_shown(recipe[key]):28} {recipe.sources.get(key, 'default')}".rstrip()
            for key in keys
            if key in recipe.settings
        ]
        if rows:
            blocks.append("\n".join([topic, *rows]))
    if recipe.environment:
        rows = [f"  {name:35} {value}".rstrip() for name, value in recipe.environment.items()]
        blocks.append("\n".join(["environment", *rows]))
    return "\n\n".join(blocks)


def _shown(value: object) -> str:
    """A value as a recipe file has it; paths below the current folder are relative."""
    return str(value).lower() if isinstance(value, bool) else str(value).removeprefix(f"{Path.cwd()}/")


def _needs(recipe: Recipe) -> str:
    needed, wire = estimates.memory(recipe), estimates.wire_bytes_per_step(recipe)
    tokens = recipe["global-batch-size"] * recipe["seq-length"]
    flops = estimates.flops_per_step(recipe)
    sizes = " x ".join(f"{name} {size}" for name, size in {**recipe.layout, "DP": recipe.dp}.items())
    count = estimates.total_parameters(recipe)
    rows = {
        "ranks": f"{recipe['nodes']} x {recipe['gpus-per-node']} ({sizes})",
        "parameters": f"{count:,}, vocabulary {estimates.padded_vocabulary(recipe):,}",
        "steps": f"{recipe['train-iters']:,}",
        "tokens": f"{tokens:,} a step, {tokens * recipe['train-iters']:.3g} in all, "
        f"{tokens * recipe['train-iters'] / count:.3g} for each parameter",
        "memory on the fullest GPU": _memory_row(needed, recipe["gpu-memory-gib"]),
        "floating-point operations": f"{flops:.3g} a step ({flops / recipe.ranks:.3g} on each GPU)",
        "sent by each GPU": ", ".join(f"{name} {_size(sent)}" for name, sent in wire.items() if sent) or "nothing",
    }
    if recipe["optimizer"] == "lion" and recipe.get("use-distributed-optimizer") and recipe.dp > 1:
        rows["gather after a step"] = _gather_row(recipe)
        if (reduce := recipe.get("lion-reduce", LionOptions.reduce)) != "stock":
            inside, packed = estimates.reduce_bytes(recipe)
            first = f" after {_size(inside)} inside the node" if inside else ""
            stock = _size(estimates.reduce_bytes(recipe, "stock")[0])
            rows["reduction of gradients"] = (
                f"lion-reduce={reduce} {_size(packed)}{first} (experimental); with lion-reduce=stock {stock}"
            )
    if recipe.has_rounds:
        rows["norm-ratio rounds"] = _rounds_row(recipe)
    hours = estimates.hours(recipe, UTILIZATION)
    if hours is not None:
        rows[f"time at {UTILIZATION:.0%} of the peak"] = (
            f"{3600 * hours / recipe['train-iters']:.3g} s a step, {_three_digits(hours)} hours, "
            f"{_three_digits(hours * recipe.ranks)} GPU-hours (without evaluation, checkpoints and rounds)"
        )
    return "\n".join(["estimates", *(f"  {name:26} {value}" for name, value in rows.items())])


def _rounds_row(recipe: Recipe) -> str:
    interval = recipe.get("norm-ratio-interval")
    moments = [f"every {interval:,} steps"] if interval else []
    moments += ["before the first step"] if recipe.get("norm-ratio-at-start") else []
    return f"{recipe.get('norm-ratio-batches', NormRatioOptions.batches)} batches {' and '.join(moments)}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory_row(needed: estimates.Memory, there: float) -> str:
    parts = ("weights", "gradients", "state", "residual", "round_copy", "activations")
    listed = " + ".join(
        f"{name.replace('_', ' ')} {_size(getattr(needed, name))}" for name in parts if getattr(needed, name)
    )
    return f"{_size(needed.total)} of {there:g} GiB: {listed}"


def _gather_row(recipe: Recipe) -> str:
    """Bytes and time of the gather in use, then of the other one."""
    used = recipe.get("lion-gather", LionOptions.gather)
    parts = []
    for gather in sorted(GATHERS, key=lambda gather: gather != used):
        seconds = estimates.gather_seconds(recipe, gather)
        time = "" if seconds is None else f" ({1000 * seconds:.3g} ms at {recipe['gpu-link-gbps']:g} Gb/s)"
        parts.append(f"lion-gather={gather} {_size(estimates.gather_bytes(recipe, gather))}{time}")
    return f"{parts[0]}; with {parts[1]}"


def _size(count: int) -> str:
    return f"{count / estimates.GIB:.2f} GiB" if count >= estimates.GIB / 10 else f"{count / 2**20:.2f} MiB"
