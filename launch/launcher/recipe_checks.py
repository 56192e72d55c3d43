"""Checks of a recipe before anything starts. Each error names the key, its value and the fix."""

import importlib.util
import math

from megatron_lion.config import (
    ERROR_FEEDBACKS,
    GATHERS,
    REDUCES,
    LionError,
    check_choice,
    check_data_prefix,
    warning_about,
)

from . import estimates, lion_checks, ranges, slurm
from .recipe_files import ROOT
from .recipes import Recipe

CHOICES = {
    "optimizer": tuple(estimates.MOMENTS),
    "device": ("cuda", "cpu"),
    "script": ("pretrain_gpt.py", "pretrain_bert.py"),
    "distributed-backend": ("nccl", "gloo"),
    "lr-decay-style": ("constant", "linear", "cosine", "inverse-square-root"),
    "recompute-granularity": ("full", "selective"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "position-embedding-type": ("learned_absolute", "rope"),
    "lion-gather": GATHERS,
    "lion-reduce": REDUCES,
    "lion-error-feedback": ERROR_FEEDBACKS,
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


def check(recipe: Recipe, extra: list[str] | None = None) -> None:
    """Raise LionError for the first setting that cannot work; needs no GPU, no Megatron and none of the files.

    ``extra`` are the flags after ``--`` that are not keys of a recipe.
    """
    missing = [key for key in REQUIRED if key not in recipe.settings]
    if missing:
        reasons = "".join(f" {note}" for note in recipe.notes)
        raise LionError(
            f"the recipe does not set {', '.join(missing)}: add it to a file, or as {missing[0]}=... to the "
            f"command.{reasons}"
        )
    ranges.check(recipe)
    _check_words(recipe)
    lion_checks.check(recipe, extra or [])
    _check_fsdp(recipe, extra or [])
    _check_model(recipe)
    _check_layout(recipe)
    _check_schedule(recipe)
    _check_device(recipe)
    slurm.check(recipe)
    _check_memory(recipe)


def _check_words(recipe: Recipe) -> None:
    for key, valid in CHOICES.items():
        if key in recipe.settings:
            check_choice(key, recipe[key], valid)
    for key in DATA_KEYS:
        check_data_prefix(key, recipe.get(key, ""))
    for key in ("run", "save", "load"):
        if recipe.get(key) == "":
            raise LionError(f"{key} is empty: use a folder, or remove the key for its default")


def _check_model(recipe: Recipe) -> None:
    heads, hidden = recipe["num-attention-heads"], recipe["hidden-size"]
    if hidden % heads:
        raise LionError(f"hidden-size {hidden} is not divisible by num-attention-heads {heads}: {_divisors(hidden)}")
    tp, pp = recipe.layout["TP"], recipe.layout["PP"]
    if heads % tp:
        raise LionError(
            f"num-attention-heads {heads} is not divisible by tensor-model-parallel-size {tp}: "
            f"{_divisors(math.gcd(heads, recipe['gpus-per-node']))}"
        )
    if recipe.get("group-query-attention") and heads % recipe.get("num-query-groups", 1):
        raise LionError(
            f"num-attention-heads {heads} is not divisible by num-query-groups {recipe['num-query-groups']}: "
            f"{_divisors(heads)}"
        )
    if recipe["num-layers"] % pp:
        raise LionError(
            f"num-layers {recipe['num-layers']} is not divisible by pipeline-model-parallel-size {pp}: "
            f"{_divisors(recipe['num-layers'])}"
        )
    if recipe["seq-length"] > recipe["max-position-embeddings"]:
        raise LionError(
            f"seq-length {recipe['seq-length']} is greater than max-position-embeddings "
            f"{recipe['max-position-embeddings']}: raise max-position-embeddings, too"
        )
    if recipe.get("sequence-parallel") and tp == 1:
        raise LionError(
            "sequence-parallel needs a tensor-model-parallel-size of at least 2: raise it, or set "
            "sequence-parallel=false"
        )
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
            f"tensor-model-parallel-size {layout['TP']} exceeds gpus-per-node {recipe['gpus-per-node']}: use one of "
            f"{', '.join(map(str, _divisors_of(recipe['gpus-per-node'])))}, and raise pipeline-model-parallel-size "
            "instead"
        )
    if recipe.addresses and len(recipe.addresses) != recipe["nodes"]:
        raise LionError(
            f"node-addresses lists {len(recipe.addresses)} of {recipe['nodes']} nodes ({recipe['node-addresses']}): "
            "set one address for each node, separated by commas"
        )
    step = recipe["micro-batch-size"] * recipe.dp
    if recipe["global-batch-size"] % step:
        below = recipe["global-batch-size"] // step * step
        nearest = f"{below} or {below + step}" if below else str(step)
        raise LionError(
            f"global-batch-size {recipe['global-batch-size']} is not divisible by micro-batch-size "
            f"{recipe['micro-batch-size']} x {recipe.dp} data-parallel replicas: use {nearest}, or another "
            "micro-batch-size"
        )


def _check_schedule(recipe: Recipe) -> None:
    if recipe.get("min-lr", 0.0) > recipe["lr"]:
        raise LionError(f"min-lr {recipe['min-lr']:g} is greater than lr {recipe['lr']:g}; lower min-lr with lr")
    decay, warmup = recipe.get("lr-decay-iters", recipe["train-iters"]), recipe.get("lr-warmup-iters", 0)
    if warmup >= decay:
        raise LionError(f"lr-warmup-iters {warmup} does not end before lr-decay-iters {decay}: change one of them")


def _check_device(recipe: Recipe) -> None:
    on_cpu = recipe["device"] == "cpu"
    if on_cpu != (recipe["distributed-backend"] == "gloo"):
        right = "gloo" if on_cpu else "nccl"
        raise LionError(
            f"device {recipe['device']} with distributed-backend {recipe['distributed-backend']} is not "
            f"supported: use distributed-backend={right}"
        )
    if on_cpu and recipe.environment.get("MEGATRON_LION_DEVICE") != "cpu":
        raise LionError(
            "device cpu needs MEGATRON_LION_DEVICE: cpu under environment in the cluster file (see "
            "configs/clusters/cpu.yaml), or device=cpu on the command line, which sets it"
        )
    if on_cpu and recipe.get("transformer-impl") != "local":
        raise LionError(f"transformer-impl {recipe.get('transformer-impl')} needs a GPU: use transformer-impl=local")


def _check_fsdp(recipe: Recipe, extra: list[str]) -> None:
    if "--use-megatron-fsdp" in extra and recipe.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise LionError(
            f"Megatron-FSDP does not start with CUDA_DEVICE_MAX_CONNECTIONS=1, which the cluster {recipe.names[2]} "
            "sets under environment: use a copy of its file without that line"
        )


def check_gpus(recipe: Recipe) -> None:
    """Raise LionError if this machine lacks GPUs, or packages that the recipe needs on one."""
    import torch

    if torch.cuda.device_count() < recipe["gpus-per-node"]:
        raise LionError(
            f"gpus-per-node is {recipe['gpus-per-node']}, but torch sees {torch.cuda.device_count()} GPUs here: "
            "set gpus-per-node, or use the cluster cpu"
        )
    if recipe.get("transformer-impl") == "transformer_engine" and not _is_installed("transformer_engine"):
        raise LionError(
            "transformer-impl transformer_engine, but Transformer Engine is not installed here: install it, or use "
            "transformer-impl=local no-persist-layer-norm=true"
        )
    if not (recipe.get("no-gradient-accumulation-fusion") or _is_installed("fused_weight_gradient_mlp_cuda")):
        raise LionError(
            "Megatron fuses gradient accumulation with NVIDIA's Apex (its module fused_weight_gradient_mlp_cuda), "
            "which is not installed here: install it, or use no-gradient-accumulation-fusion=true"
        )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_memory(recipe: Recipe) -> None:
    needed, there = estimates.memory(recipe), recipe["gpu-memory-gib"] * estimates.GIB
    if needed.total <= there:
        return
    remedy = (
        "lower micro-batch-size"
        if needed.static + needed.round_copy <= 0.8 * there and recipe["micro-batch-size"] > 1
        else "raise nodes or tensor-model-parallel-size"
    )
    raise LionError(
        f"the run needs about {needed.total / estimates.GIB:.1f} GiB on each GPU (weights, gradients and state "
        f"{needed.static / estimates.GIB:.1f}, activations {needed.activations / estimates.GIB:.1f}), more than "
        f"gpu-memory-gib {recipe['gpu-memory-gib']:g}: {remedy}, or correct gpu-memory-gib"
    )


def warnings(recipe: Recipe) -> list[str]:
    """What the run itself will warn about at its start."""
    warning = warning_about(recipe["lr"], recipe["weight-decay"]) if recipe["optimizer"] == "lion" else None
    return [warning] if warning else []


def missing_files(recipe: Recipe) -> list[str]:
    """Files that the recipe reads and that are missing or empty here: ``key: path``, one for each key."""
    found = []
    for key in DATA_KEYS:
        for prefix in [recipe[key]] if key in recipe.settings else []:
            absent = [suffix for suffix in (".bin", ".idx") if not _has_content(recipe, prefix + suffix)]
            if absent:
                found.append(f"{key}: {prefix}{' and '.join(absent)}")
    return found + [
        f"{key}: {recipe[key]}"
        for key in FILE_KEYS
        if key in recipe.settings and not any(path.exists() for path in slurm.places(recipe, recipe[key]))
    ]


def _has_content(recipe: Recipe, file: str) -> bool:
    return any(path.is_file() and path.stat().st_size > 0 for path in slurm.places(recipe, file))


def check_files(recipe: Recipe) -> None:
    """Raise LionError naming every file that is missing or empty."""
    absent = missing_files(recipe)
    if not (ROOT / "launch" / recipe["script"]).is_file():
        raise LionError(
            f"script: launch/{recipe['script']} is not in this checkout; recipes with it cannot be run here"
        )
    if absent:
        maker = "demo_text.py" if recipe["tokenizer-type"] == "SentencePieceTokenizer" else "prepare_text.py"
        raise LionError(
            f"missing or empty files: {'; '.join(absent)}. Make them with tools/{maker}, or set data=... to their path"
        )


def _divisors(number: int) -> str:
    return f"use one of {', '.join(map(str, _divisors_of(number)))}"


def _divisors_of(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return [*small, *(number // divisor for divisor in reversed(small) if divisor**2 != number)]
