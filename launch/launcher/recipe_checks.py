"""What must hold before anything starts: each check names the key, its value and the fix."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_lion.config import GATHERS, LionError, LionOptions, betas_or_default, check_choice, check_non_negative

from . import estimates
from .recipes import MEGATRON_KEYS, ROOT, SLURM_PORTS, SLURM_WARNING, Recipe

POSITIVE = (
    "num-layers", "hidden-size", "num-attention-heads", "seq-length", "max-position-embeddings", "global-batch-size",
    "micro-batch-size", "train-iters", "vocab-size", "nodes", "gpus-per-node", "tensor-model-parallel-size",
    "pipeline-model-parallel-size", "context-parallel-size", "save-interval", "eval-interval", "log-interval",
    "lr-decay-iters", "norm-ratio-batches", "gpu-memory-gib", "distributed-timeout-minutes", "slurm-cpus",
    "join-timeout",
)  # fmt: skip
FRACTIONS = (
    "hidden-dropout", "attention-dropout", "mask-prob", "short-seq-prob", "sgd-momentum", "adam-beta1", "adam-beta2",
)  # fmt: skip
CHOICES = {
    "optimizer": tuple(estimates.MOMENTS),
    "device": ("cuda", "cpu"),
    "script": ("pretrain_gpt.py", "pretrain_bert.py"),
    "distributed-backend": ("nccl", "gloo"),
    "lr-decay-style": ("constant", "linear", "cosine", "inverse-square-root"),
    "recompute-granularity": ("full", "selective"),
    "lion-gather": GATHERS,
    "lion-momentum-dtype": tuple(estimates.LION_MOMENTUM),
    "lion-master-weights": tuple(estimates.MASTER_WEIGHTS),
}
REQUIRED = (
    "script", "num-layers", "hidden-size", "num-attention-heads", "seq-length", "max-position-embeddings",
    "vocab-size", "global-batch-size", "micro-batch-size", "train-iters", "optimizer", "lr", "weight-decay", "nodes",
    "gpus-per-node", "device", "gpu-memory-gib", "distributed-backend", "tokenizer-type",
)  # fmt: skip
DATA_KEYS = ("train-data-path", "valid-data-path", "test-data-path")
FILE_KEYS = ("tokenizer-model", "vocab-file", "merge-file")


def check(recipe: Recipe, extra: Sequence[str] = ()) -> None:
    """Raise LionError for the first thing that cannot work; needs no GPU, no Megatron and none of the files.

    ``extra`` are the words after ``--``, which Megatron reads last: a recipe's key among them would win unchecked.
    """
    for word in extra:
        key = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and key in MEGATRON_KEYS:
            raise LionError(
                f"{word} after -- is a recipe's key: set it as {key}=..., so that it is checked and recorded"
            )
    missing = [key for key in REQUIRED if key not in recipe.settings]
    if missing:
        raise LionError(
            f"the recipe sets no {', '.join(missing)}: add it to a file, or as {missing[0]}=... to the command"
        )
    _check_values(recipe)
    _check_model(recipe)
    _check_layout(recipe)
    _check_schedule(recipe)
    _check_device(recipe)
    _check_memory(recipe)


def _check_values(recipe: Recipe) -> None:
    for key in POSITIVE:
        if key in recipe.settings and not recipe[key] > 0:
            raise LionError(f"{key} must be above 0, got {recipe[key]:g}")
    for key in FRACTIONS:
        if key in recipe.settings and not 0.0 <= recipe[key] < 1.0:
            raise LionError(f"{key} must lie in [0, 1), got {recipe[key]:g}")
    for key, valid in CHOICES.items():
        if key in recipe.settings:
            check_choice(key, recipe[key], valid)
    last_port = 65536 - SLURM_PORTS
    if not 1 <= recipe.get("master-port", 1) <= last_port:
        raise LionError(f"master-port must lie in [1, {last_port}], got {recipe['master-port']}")
    if "slurm-time" in recipe.settings and slurm_seconds(recipe["slurm-time"]) <= SLURM_WARNING:
        raise LionError(
            f"slurm-time {recipe['slurm-time']} is not longer than the {SLURM_WARNING} seconds before its end at which "
            "a job is told to save and end: each one would end at its first step. Give more"
        )
    for key in ("lr", "min-lr", "weight-decay", "clip-grad"):
        check_non_negative(key, recipe.get(key, 0.0))
    if recipe["optimizer"] == "lion":
        LionOptions(betas=betas_or_default(recipe.get("lion-beta1"), recipe.get("lion-beta2")))


def slurm_seconds(text: str) -> float:
    """A time limit of sbatch in seconds.

    It is minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds;
    0 and UNLIMITED are no limit. Raises LionError for anything else.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if text.upper() in ("INFINITE", "UNLIMITED"):
        return math.inf
    if not found:
        raise LionError(f"slurm-time {text!r} is not a Slurm time limit; use one like 2-00:00:00 or 12:30:00")
    numbers = [int(number) for number in found.groups()[1:] if number is not None]
    units = (60, 1) if found[1] is None and len(numbers) < 3 else (3600, 60, 1)
    seconds = 86400 * int(found[1] or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    return seconds or math.inf


def _check_model(recipe: Recipe) -> None:
    heads, hidden = recipe["num-attention-heads"], recipe["hidden-size"]
    if hidden % heads:
        raise LionError(f"hidden-size {hidden} is not divisible by num-attention-heads {heads}: {_divisors(hidden)}")
    tp, pp = recipe.layout["TP"], recipe.layout["PP"]
    if heads % tp:
        raise LionError(
            f"num-attention-heads {heads} is not divisible by tensor-model-parallel-size {tp}: {_divisors(heads)}"
        )
    if recipe["num-layers"] % pp:
        raise LionError(
            f"num-layers {recipe['num-layers']} is not divisible by pipeline-model-parallel-size {pp}: "
            f"{_divisors(recipe['num-layers'])}"
        )
    if recipe["seq-length"] > recipe["max-position-embeddings"]:
        raise LionError(
            f"seq-length {recipe['seq-length']} is above max-position-embeddings {recipe['max-position-embeddings']}: "
            "raise the latter with it"
        )
    if recipe.get("sequence-parallel") and tp == 1:
        raise LionError("sequence-parallel needs tensor-model-parallel-size above 1: set it, or drop sequence-parallel")
    if recipe.get("bf16") and recipe.get("fp16"):
        raise LionError("bf16 and fp16 are both true: set one of them to false")


def _check_layout(recipe: Recipe) -> None:
    layout = recipe.layout
    needed = math.prod(layout.values())
    sizes = " x ".join(f"{name} {size}" for name, size in layout.items())
    if recipe.ranks % needed:
        raise LionError(
            f"{sizes} needs a multiple of {needed} GPUs, but nodes {recipe['nodes']} x gpus-per-node "
            f"{recipe['gpus-per-node']} are {recipe.ranks}: change gpus-per-node, nodes, or the layout"
        )
    if layout["TP"] > recipe["gpus-per-node"]:
        raise LionError(
            f"tensor-model-parallel-size {layout['TP']} reaches over the gpus-per-node {recipe['gpus-per-node']} of a "
            "node: lower it, and raise pipeline-model-parallel-size instead"
        )
    if recipe.addresses and len(recipe.addresses) != recipe["nodes"]:
        raise LionError(
            f"node-addresses {recipe['node-addresses']} are {len(recipe.addresses)}, but nodes is {recipe['nodes']}: "
            "set one for each, separated by commas"
        )
    step = recipe["micro-batch-size"] * recipe.dp
    if recipe["global-batch-size"] % step:
        below = recipe["global-batch-size"] // step * step
        nearest = f"{below} or {below + step}" if below else str(step)
        raise LionError(
            f"global-batch-size {recipe['global-batch-size']} is not divisible by micro-batch-size "
            f"{recipe['micro-batch-size']} x {recipe.dp} data-parallel replicas: take {nearest}, or another "
            "micro-batch-size"
        )


def _check_schedule(recipe: Recipe) -> None:
    if recipe.get("min-lr", 0.0) > recipe["lr"]:
        raise LionError(f"min-lr {recipe['min-lr']:g} is greater than lr {recipe['lr']:g}; lower min-lr with lr")
    decay, warmup = recipe.get("lr-decay-iters", recipe["train-iters"]), recipe.get("lr-warmup-iters", 0)
    if warmup >= decay:
        raise LionError(f"lr-warmup-iters {warmup} does not end before lr-decay-iters {decay}: change one of them")
    if recipe.get("norm-ratio-interval", 0) < 0:
        raise LionError(f"norm-ratio-interval must be >= 0, got {recipe['norm-ratio-interval']}; 0 turns it off")


def _check_device(recipe: Recipe) -> None:
    on_cpu = recipe["device"] == "cpu"
    if on_cpu != (recipe["distributed-backend"] == "gloo"):
        right = "gloo" if on_cpu else "nccl"
        raise LionError(
            f"device {recipe['device']} with distributed-backend {recipe['distributed-backend']}: take "
            f"distributed-backend={right}"
        )
    if on_cpu and recipe.environment.get("MEGATRON_LION_DEVICE") != "cpu":
        raise LionError(
            "device cpu needs MEGATRON_LION_DEVICE: cpu under environment, as configs/clusters/cpu.yaml has it"
        )
    if on_cpu and recipe.get("transformer-impl") != "local":
        raise LionError(f"transformer-impl {recipe.get('transformer-impl')} needs a GPU: take transformer-impl=local")


def _check_memory(recipe: Recipe) -> None:
    needed, there = estimates.memory(recipe), recipe["gpu-memory-gib"] * estimates.GIB
    if needed.total <= there:
        return
    remedy = (
        "lower micro-batch-size"
        if needed.static + needed.round_copy <= 0.8 * there
        else "raise nodes or the layout's TP"
    )
    raise LionError(
        f"about {needed.total / estimates.GIB:.1f} GiB on each GPU (weights, gradients and state "
        f"{needed.static / estimates.GIB:.1f}, activations {needed.activations / estimates.GIB:.1f}) are more than "
        f"gpu-memory-gib {recipe['gpu-memory-gib']:g}: {remedy}, or correct gpu-memory-gib"
    )


def missing_files(recipe: Recipe) -> list[str]:
    """What the recipe reads and this machine lacks: ``key: path``, one for each key."""
    found = []
    for key in DATA_KEYS:
        for prefix in [recipe[key]] if key in recipe.settings else []:
            absent = [suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
            if absent:
                found.append(f"{key}: {prefix}{' and '.join(absent)}")
    return found + [
        f"{key}: {recipe[key]}" for key in FILE_KEYS if key in recipe.settings and not Path(recipe[key]).exists()
    ]


def check_files(recipe: Recipe) -> None:
    """Raise LionError naming every file that is not there."""
    absent = missing_files(recipe)
    if not (ROOT / "launch" / recipe["script"]).is_file():
        raise LionError(
            f"script: launch/{recipe['script']} is not in this checkout; recipes with it cannot be run here"
        )
    if absent:
        maker = "demo_text.py" if recipe["tokenizer-type"] == "SentencePieceTokenizer" else "prepare_text.py"
        raise LionError(
            f"not there: {'; '.join(absent)}. Make them with tools/{maker}, or set data=... to where they are"
        )


def _divisors(number: int) -> str:
    return f"take one of {', '.join(str(n) for n in range(1, number + 1) if number % n == 0)}"
