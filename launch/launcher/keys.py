"""Keys of a recipe by topic, and the type of each. Every key outside ``LAUNCH_KEYS`` is a flag of Megatron's."""

import contextlib
import re
from typing import Any

from megatron_lion.config import ALL_BATCHES, LionError
from megatron_lion.nearest import hint

# Keys that launch.py itself reads. All other keys are Megatron's flags without their dashes.
LAUNCH_TOPICS: dict[str, dict[str, type]] = {
    "run": {
        "script": str,
        "run": str,
        "data": str,
        "vocab-size": int,  # only for the estimates; Megatron asks the tokenizer
    },
    "cluster": {
        "nodes": int,
        "gpus-per-node": int,
        "device": str,
        "gpu-memory-gib": float,
        "gpu-peak-tflops": float,
        "gpu-link-gbps": float,  # to other nodes, or inside the only one; Gb/s in one direction
        "max-restarts": int,
        "join-timeout": int,  # seconds that a node waits for the others; default 600
        "master-address": str,
        "master-port": int,
        "node-addresses": str,  # one for each node, separated by commas
    },
    "slurm": {
        "slurm-time": str,
        "slurm-cpus": int,  # on each node; default: one for each rank and each of its data workers
        "slurm-partition": str,
        "slurm-account": str,
        "slurm-qos": str,
        "slurm-constraint": str,
        "slurm-exclusive": bool,
        "slurm-sbatch-args": str,  # further options of sbatch, separated by blanks
        "slurm-srun-args": str,  # further options of srun
        "slurm-setup": str,  # shell lines that run first, on the first node, outside the container
        "slurm-python": str,  # the Python of the job, as seen inside the container if there is one
    },
    "container": {
        "container": str,  # pyxis or apptainer
        "container-image": str,
        "container-mounts": str,  # SOURCE:TARGET or SOURCE:TARGET:OPTIONS, separated by commas
        "container-workdir": str,
        "container-args": str,  # further options of apptainer exec, or of srun with pyxis
    },
}
MEGATRON_TOPICS: dict[str, dict[str, type]] = {
    "model": {
        "num-layers": int,
        "hidden-size": int,
        "ffn-hidden-size": int,
        "num-attention-heads": int,
        "group-query-attention": bool,
        "num-query-groups": int,
        "seq-length": int,
        "max-position-embeddings": int,
        "position-embedding-type": str,
        "rotary-base": int,
        "normalization": str,
        "norm-epsilon": float,
        "swiglu": bool,
        "disable-bias-linear": bool,
        "untie-embeddings-and-output-weights": bool,
        "make-vocab-size-divisible-by": int,
        "hidden-dropout": float,
        "attention-dropout": float,
        "init-method-std": float,
        "seed": int,
    },
    "data": {
        "tokenizer-type": str,
        "tokenizer-model": str,
        "vocab-file": str,
        "merge-file": str,
        "train-data-path": str,
        "valid-data-path": str,
        "test-data-path": str,
        "data-cache-path": str,
        "mask-prob": float,
        "short-seq-prob": float,
        "num-workers": int,
    },
    "optimizer": {
        "optimizer": str,
        "lr": float,
        "min-lr": float,
        "weight-decay": float,
        "lion-beta1": float,
        "lion-beta2": float,
        "adam-beta1": float,
        "adam-beta2": float,
        "adam-eps": float,
        "sgd-momentum": float,
        "clip-grad": float,
        "lion-momentum-dtype": str,
        "lion-master-weights": str,
        "lion-gather": str,
        "lion-gather-refresh": int,
        "lion-reduce": str,
        "lion-error-feedback": str,
    },
    "schedule and batch": {
        "train-iters": int,
        "lr-decay-style": str,
        "lr-decay-iters": int,
        "lr-warmup-iters": int,
        "global-batch-size": int,
        "micro-batch-size": int,
    },
    "parallelism": {
        "tensor-model-parallel-size": int,
        "pipeline-model-parallel-size": int,
        "context-parallel-size": int,
        "sequence-parallel": bool,
        "use-distributed-optimizer": bool,
        "overlap-grad-reduce": bool,
        "overlap-param-gather": bool,
        "grad-reduce-in-bf16": bool,
        "distributed-backend": str,
        "distributed-timeout-minutes": int,
    },
    "precision and kernels": {
        "bf16": bool,
        "fp16": bool,
        "transformer-impl": str,
        "attention-backend": str,
        "recompute-granularity": str,
        "no-gradient-accumulation-fusion": bool,
        "no-rope-fusion": bool,
        "no-persist-layer-norm": bool,
        "no-masked-softmax-fusion": bool,
    },
    "checkpoints and logs": {
        "save": str,
        "load": str,
        "save-interval": int,
        "exit-interval": int,
        "exit-signal-handler": bool,
        "log-interval": int,
        "log-throughput": bool,
        "eval-interval": int,
        "eval-iters": int,
        "tensorboard-dir": str,
        "norm-ratio-interval": int,
        "norm-ratio-batches": int,
        "norm-ratio-at-start": bool,
        "norm-ratio-file": str,
    },
}
TOPICS = LAUNCH_TOPICS | MEGATRON_TOPICS
LAUNCH_KEYS = {key: kind for topic in LAUNCH_TOPICS.values() for key, kind in topic.items()}
MEGATRON_KEYS = {key: kind for topic in MEGATRON_TOPICS.values() for key, kind in topic.items()}
KEYS = LAUNCH_KEYS | MEGATRON_KEYS
PATH_KEYS = (
    "data", "run", "train-data-path", "valid-data-path", "test-data-path", "data-cache-path", "tokenizer-model",
    "vocab-file", "merge-file", "save", "load", "tensorboard-dir", "norm-ratio-file",
)  # fmt: skip
# Usual names elsewhere that are spelled too differently to be found by their letters.
OTHER_NAMES = {
    "learning-rate": "lr", "wd": "weight-decay", "steps": "train-iters", "max-steps": "train-iters",
    "tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size", "cp": "context-parallel-size",
}  # fmt: skip
WORDS = {"norm-ratio-batches": ALL_BATCHES}  # accepted besides a number
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def typed(key: str, value: Any, where: str) -> Any:
    """The text ``value`` as the key's type. Raises LionError for an unknown key or a value of another type."""
    if key not in KEYS:
        other = OTHER_NAMES.get(key.replace("_", "-").lower())
        raise LionError(
            f"unknown key {key!r} {where}: {hint(other or key, KEYS)}launch.py --help lists the keys. Other flags of "
            "Megatron's go after --"
        )
    expected = KEYS[key]
    if isinstance(value, str):
        if expected is str or value == WORDS.get(key):
            return value
        if expected is bool and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        if expected is float or (expected is int and re.fullmatch(r"[+-]?\d[\d_]*", value)):
            with contextlib.suppress(ValueError):
                return expected(value)
    raise LionError(f"{key} {where} must be {TYPE_NAMES[expected]}, got {value!r}")
