"""Estimates for a recipe: parameters and bytes on each GPU, floating-point operations and bytes sent in each step.

Parameters, gradients and optimizer state are counted exactly as Megatron-Core lays them out; activations and the
traffic are estimates, by the formulas in the docstrings.
"""

import dataclasses
import math
from dataclasses import dataclass

from megatron_lion.config import LionOptions

from .recipes import Recipe

GIB = 1 << 30
# Bytes of state for each parameter: moments, and master weights of 16-bit parameters.
MOMENTS = {"lion": 4.0, "adam": 8.0, "sgd": 4.0}
LION_MOMENTUM = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 32}
MASTER_WEIGHTS = {"fp32": 4.0, "remainder": 2.0}
# Bytes of a residual of --lion-reduce, and bits of a gradient that it sends.
ERROR_FEEDBACK = {"int8": 1 + 2 / 64, "bf16": 2.0, "none": 0.0}
REDUCED_BITS = {"int8": 8.25, "int4": 4.25, "ternary": 1.85}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU."""

    weights: int
    gradients: int
    state: int
    residual: int
    """the residuals of --lion-reduce"""
    round_copy: int
    """the norm ratio's fp32 mean gradient"""
    activations: int

    @property
    def static(self) -> int:
        """Bytes that do not depend on the batch: weights, gradients, optimizer state, residuals."""
        return self.weights + self.gradients + self.state + self.residual

    @property
    def total(self) -> int:
        return self.static + self.round_copy + self.activations


def padded_vocabulary(recipe: Recipe) -> int:
    """Rows of Megatron's padded vocabulary, a multiple of 128 x TP."""
    multiple = int(recipe.get("make-vocab-size-divisible-by", 128)) * recipe.layout["TP"]
    return -(-int(recipe["vocab-size"]) // multiple) * multiple


def parameters(recipe: Recipe) -> list[int]:
    """Parameters on one rank of each pipeline stage, as GPTModel and BertModel of megatron-core 0.19 have them.

    With h hidden, k = h x query groups / heads, f = ffn (twice as wide going in with SwiGLU: u = 2 f, else u = f),
    t = TP, V = padded vocabulary, P = learned positions, n = 2 h for a LayerNorm or h for an RMSNorm::

        layer      (2 h^2 + 2 h k + h u + h f) / t + 2 n            biases: + (h + 2 k + u) / t + 2 h
        first      V h / t + P h                    (BERT: + 2 h token types)
        last       n final norm, + V h / t where the first stage is another one or the output is untied
                   (BERT: + h^2 + 3 h head, V / t bias, h^2 + h pooler, 2 h + 2 order)
    """
    h, tp, pp = int(recipe["hidden-size"]), recipe.layout["TP"], recipe.layout["PP"]
    k, f, norm = _key_width(recipe), _ffn(recipe), h if recipe.get("normalization") == "RMSNorm" else 2 * h
    up = 2 * f if recipe.get("swiglu") else f
    vocabulary = padded_vocabulary(recipe) // tp
    bert = recipe["script"] == "pretrain_bert.py"
    layer = (2 * h * h + 2 * h * k + h * up + h * f) // tp + 2 * norm
    if not recipe.get("disable-bias-linear"):
        layer += (h + 2 * k + up) // tp + 2 * h
    stages = [int(recipe["num-layers"]) // pp * layer for _ in range(pp)]
    stages[0] += vocabulary * h + (2 * h if bert else 0)
    if recipe.get("position-embedding-type", "learned_absolute") == "learned_absolute":
        stages[0] += int(recipe["max-position-embeddings"]) * h
    stages[-1] += norm
    if pp > 1 or recipe.get("untie-embeddings-and-output-weights"):
        stages[-1] += vocabulary * h
    if bert:
        stages[-1] += h * h + 3 * h + vocabulary + h * h + h + 2 * h + 2
    return stages


def _ffn(recipe: Recipe) -> int:
    """Megatron's default is 4 h, and with SwiGLU two thirds of that, as a multiple of 64."""
    h = int(recipe["hidden-size"])
    default = int(4 * h * 2 / 3 / 64) * 64 if recipe.get("swiglu") else 4 * h
    return int(recipe.get("ffn-hidden-size", default))


def _key_width(recipe: Recipe) -> int:
    """Width of the keys of all heads, and of the values."""
    h, heads = int(recipe["hidden-size"]), int(recipe["num-attention-heads"])
    groups = int(recipe.get("num-query-groups", 1)) if recipe.get("group-query-attention") else heads
    return h // heads * groups


def total_parameters(recipe: Recipe) -> int:
    """Parameters of the whole model, each counted once, with the padded vocabulary of one rank."""
    alone = {"tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1}
    alone["vocab-size"] = padded_vocabulary(recipe)
    return parameters(dataclasses.replace(recipe, settings=recipe.settings | alone))[0]


def memory(recipe: Recipe) -> Memory:
    """Bytes on the fullest GPU. State is moments, and master weights of 16-bit parameters, divided by DP if sharded."""
    count = max(parameters(recipe))
    half = bool(recipe.get("bf16") or recipe.get("fp16"))
    shards = recipe.dp * recipe.layout["CP"] if recipe.get("use-distributed-optimizer") else 1
    shard = -(-count // shards)
    return Memory(
        weights=count * (2 if half else 4),
        gradients=count * (2 if recipe.get("grad-reduce-in-bf16") else 4),  # fp32 also for bf16 weights, unless asked
        state=round(shard * _state_bytes(recipe, half)),
        residual=round(_packed_share(recipe) * count * _feedback_bytes(recipe)),
        round_copy=4 * shard if recipe.has_rounds else 0,
        activations=_activations(recipe, 2 if half else 4),
    )


def _feedback_bytes(recipe: Recipe) -> float:
    """Bytes of error feedback for each packed parameter."""
    if recipe.get("lion-reduce", LionOptions.reduce) == "stock":
        return 0.0
    return ERROR_FEEDBACK[recipe.get("lion-error-feedback", LionOptions.error_feedback)]


def _state_bytes(recipe: Recipe, half: bool) -> float:
    """Bytes of optimizer state for each parameter."""
    moments = MOMENTS[recipe["optimizer"]] if recipe.get("sgd-momentum", 1.0) else 0.0
    master = 4.0
    if recipe["optimizer"] == "lion":
        moments = LION_MOMENTUM[recipe.get("lion-momentum-dtype", LionOptions.momentum_dtype)]
        master = MASTER_WEIGHTS[recipe.get("lion-master-weights", LionOptions.master_weights)]
    return moments + (master if half else 0.0)


def _activations(recipe: Recipe, width: int) -> int:
    """Bytes that the first stage holds for the backward pass, and the logits of the last one.

    Korthikanti et al. (2022), arXiv 2205.05198, equation 2, for b sequences of s tokens, a heads, 16-bit values, with
    the keys' width k and SwiGLU (u and f as in :func:`parameters`) counted in the same way::

        s b (8 h + 2 h with dropout + (4 h + 4 k + 2 u + 2 f) / t + 5 a s / t) per layer: 34 s b h for f = u = 4 h
        2 s b h with full recomputation

    Sequence parallelism also divides the first two summands by t. Attention kernels that never store the scores
    (flash) need less: the last summand is then absent. Logits: s b V / t in 16 bits and twice in fp32.
    """
    s, b = int(recipe["seq-length"]) // recipe.layout["CP"], int(recipe["micro-batch-size"])
    h, k, f = int(recipe["hidden-size"]), _key_width(recipe), _ffn(recipe)
    tp, pp, heads = recipe.layout["TP"], recipe.layout["PP"], int(recipe["num-attention-heads"])
    unsharded = (10 if recipe.get("hidden-dropout", 0.1) else 8) * h
    sharded = 4 * h + 4 * k + (4 if recipe.get("swiglu") else 2) * f + 2 * f
    if recipe.get("transformer-impl") == "local":
        sharded += 5 * heads * s
    per_layer = unsharded / (tp if recipe.get("sequence-parallel") else 1) + sharded / tp
    if recipe.get("recompute-granularity") == "full":
        per_layer = 2.0 * h
    layers = int(recipe["num-layers"]) // pp
    in_flight = pp  # 1F1B: the first stage holds as many micro-batches as there are stages
    logits = s * b * padded_vocabulary(recipe) // tp * (width + 8)
    return math.ceil(s * b * per_layer * layers * in_flight * width / 2) + logits


def flops_per_step(recipe: Recipe) -> float:
    """Floating-point operations of one step's forward and backward passes, as Megatron counts them::

    6 B s (L (2 h^2 + 2 h k + s h + h u + h f) + V h)        k, u, f as in :func:`parameters`
    """
    h, s, k, f = int(recipe["hidden-size"]), int(recipe["seq-length"]), _key_width(recipe), _ffn(recipe)
    up = 2 * f if recipe.get("swiglu") else f
    layers = int(recipe["num-layers"]) * (2 * h * h + 2 * h * k + s * h + h * up + h * f)
    return 6.0 * int(recipe["global-batch-size"]) * s * (layers + padded_vocabulary(recipe) * h)


def hours(recipe: Recipe, utilization: float) -> float | None:
    """Hours of all steps if each GPU reaches ``utilization`` of its peak; None if the recipe states no peak."""
    if not (peak := recipe.get("gpu-peak-tflops")):
        return None
    seconds = flops_per_step(recipe) / recipe.ranks / (utilization * 1e12 * peak)
    return seconds * int(recipe["train-iters"]) / 3600


def wire_bytes_per_step(recipe: Recipe) -> dict[str, int]:
    """Bytes that the busiest GPU sends in a step, by kind, with ring collectives of n ranks ((n - 1) / n a pass).

    Data parallel: gradients reduced (:func:`reduce_bytes`), weights gathered (sharded, :func:`gather_bytes`), or an
    all-reduce of fp32 gradients, which is two passes. Tensor parallel: four all-reduces of s b h in a layer and
    micro-batch. Pipeline: s b h both ways for a micro-batch.
    """
    count, layout, dp = max(parameters(recipe)), recipe.layout, recipe.dp
    width = 2 if recipe.get("bf16") or recipe.get("fp16") else 4
    share = (dp - 1) / dp
    data = count * 8.0 * share
    if recipe.get("use-distributed-optimizer"):
        data = sum(reduce_bytes(recipe)) + gather_bytes(recipe)
    micro_batches = int(recipe["global-batch-size"]) // (int(recipe["micro-batch-size"]) * dp)
    block = int(recipe["seq-length"]) * int(recipe["micro-batch-size"]) * int(recipe["hidden-size"]) * width
    tp, pp = layout["TP"], layout["PP"]
    return {
        "data parallel": round(data),
        "tensor parallel": round(8 * (tp - 1) / tp * block * micro_batches * (int(recipe["num-layers"]) // pp)),
        "pipeline parallel": 2 * block * micro_batches if pp > 1 else 0,
    }


def gathered_bits(recipe: Recipe, gather: str | None = None) -> float:
    """Bits per parameter that a rank sends in the gather after a step: the parameter's width, or the signs'.

    Signs are 1.6 bits, and 1.6 more with 16-bit parameters for the rounding of their masters. Exceptions are not
    counted: 0.1 bits in training at a learning rate of 1e-3, less at lower ones (docs/exchange.md).
    """
    half = bool(recipe.get("bf16") or recipe.get("fp16"))
    if (gather or recipe.get("lion-gather", LionOptions.gather)) == "signs":
        return 3.2 if half else 1.6
    return 16.0 if half else 32.0


def reduce_bytes(recipe: Recipe, reduce: str | None = None) -> tuple[int, int]:
    """Bytes that the busiest GPU sends in the reduction of gradients: in fp32, and packed with --lion-reduce.

    Packed gradients are exchanged between nodes if these hold g > 1 data-parallel ranks each, which first reduce in
    fp32. 1-D parameters are counted as packed, which they are not.
    """
    count, dp = max(parameters(recipe)), recipe.dp
    reduce = reduce or recipe.get("lion-reduce", LionOptions.reduce)
    if reduce == "stock":
        return round(count * 4 * (dp - 1) / dp), 0
    in_node = _reduced_in_node(recipe)
    return (
        round(count * 4 * (in_node - 1) / in_node),
        round(_packed_share(recipe) * count * REDUCED_BITS[reduce] / 8),
    )


def _packed_share(recipe: Recipe) -> float:
    """Share of a rank's parameters that it packs for other ranks: of other shards, or of other nodes' shards."""
    in_node = _reduced_in_node(recipe)
    return (1 - in_node / recipe.dp) / in_node


def _reduced_in_node(recipe: Recipe) -> int:
    """Data-parallel ranks that reduce inside a node before they pack: 1 unless several nodes hold several each."""
    here = recipe["gpus-per-node"] // (recipe.layout["TP"] * recipe.layout["CP"])
    is_two_levels = recipe["nodes"] > 1 and 1 < here < recipe.dp and recipe.dp % here == 0
    return here if is_two_levels else 1


def gather_bytes(recipe: Recipe, gather: str | None = None) -> int:
    """Bytes that the busiest GPU sends in the gather after a step, for ``gather`` "params" or "signs"."""
    return round(max(parameters(recipe)) * gathered_bits(recipe, gather) / 8 * (recipe.dp - 1) / recipe.dp)


def gather_seconds(recipe: Recipe, gather: str) -> float | None:
    """Seconds of that gather at the cluster's link speed, without replay; None where the recipe has no link speed.

    On several nodes the g data-parallel ranks of a node share the ring's bytes over their g links::

        8 gather_bytes / (g gpu-link-gbps 10^9),    g = min(DP, GPUs of a node / (TP CP)); 1 on one node
    """
    if not (rate := recipe.get("gpu-link-gbps")):
        return None
    links = recipe["gpus-per-node"] // (recipe.layout["TP"] * recipe.layout["CP"]) if recipe["nodes"] > 1 else 1
    return 8 * gather_bytes(recipe, gather) / (max(1, min(links, recipe.dp)) * rate * 1e9)
