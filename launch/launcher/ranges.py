"""The range of every numeric key of a recipe."""

import math
from collections.abc import Callable

from megatron_lion.config import LionError

from .keys import KEYS, WORDS
from .recipes import SLURM_PORTS, Recipe

LAST_PORT = 65536 - SLURM_PORTS
LAST_SEED = 2**32 - 1  # NumPy's; Megatron refuses 0
LAST_INTEGER = 2**63 - 1  # torch's

# The range in words, its check, and its keys. Where 0 is allowed it turns something off, or is a limit that works.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "greater than 0",
        lambda value: value > 0,
        (
            "vocab-size", "nodes", "gpus-per-node", "gpu-memory-gib", "join-timeout", "slurm-cpus", "num-layers",
            "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "seq-length",
            "max-position-embeddings", "rotary-base", "make-vocab-size-divisible-by", "init-method-std", "train-iters",
            "lr-decay-iters", "global-batch-size", "micro-batch-size", "tensor-model-parallel-size",
            "pipeline-model-parallel-size", "context-parallel-size", "distributed-timeout-minutes", "save-interval",
            "log-interval", "eval-interval", "norm-ratio-batches",
        ),
    ),
    (
        ">= 0",
        lambda value: value >= 0,
        (
            "gpu-peak-tflops", "gpu-link-gbps", "max-restarts", "norm-epsilon", "num-workers", "lr", "min-lr",
            "weight-decay", "adam-eps", "clip-grad", "lion-gather-refresh", "lr-warmup-iters", "exit-interval",
            "eval-iters", "norm-ratio-interval",
        ),
    ),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        (
            "hidden-dropout", "attention-dropout", "mask-prob", "short-seq-prob", "lion-beta1", "lion-beta2",
            "adam-beta1", "adam-beta2", "sgd-momentum",
        ),
    ),
    (f"in [1, {LAST_PORT}]", lambda value: 1 <= value <= LAST_PORT, ("master-port",)),
    (f"in [1, {LAST_SEED}]", lambda value: 1 <= value <= LAST_SEED, ("seed",)),
)  # fmt: skip


def check(recipe: Recipe) -> None:
    """Raise LionError naming the first number that is outside the range of its key, or not finite."""
    for words, is_in_range, keys in RANGES:
        for key in keys:
            value = recipe.get(key)
            if value is None or value == WORDS.get(key):
                continue
            if isinstance(value, int) and value > LAST_INTEGER:
                raise LionError(f"{key} must be at most {LAST_INTEGER}, got {value}")
            if not (math.isfinite(value) and is_in_range(value)):
                finite = "" if KEYS[key] is int or words.startswith("in ") else "a finite number "
                shown = value if KEYS[key] is int else f"{value:g}"
                raise LionError(f"{key} must be {finite}{words}, got {shown}")
