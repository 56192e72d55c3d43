"""What a machine without a GPU lacks: Transformer Engine, fused kernels, flash attention, fp8, context parallelism.

Megatron first checks the flags as given. Then each is refused, or replaced by a setting with modules of the same
parameters.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.flags.state_precision import QUANTIZED_WEIGHTS

OPTIMIZERS = ("lion", "sgd", "adam")
SAME = "same parameters, shapes and dtypes"


@dataclass(frozen=True)
class Replacement:
    """A setting of Megatron's that is replaced where ``applies`` says so, and what that means for the report."""

    dest: str
    value: Any
    meaning: str
    applies: Callable[[Any], bool] = bool


REPLACEMENTS = (
    Replacement(
        "transformer_impl",
        "local",
        f"Transformer Engine's linear, norm, attention and grouped-expert modules by Megatron's local ones: {SAME}",
        lambda value: value == "transformer_engine",
    ),
    Replacement(
        "fp8",
        None,
        "fp8 linear layers by bf16 ones: the weights are bf16 in both. Transformer Engine's fp8 copies of weights and "
        "activations are not counted",
    ),
    Replacement(
        "fp4",
        None,
        "fp4 linear layers by bf16 ones: the weights are bf16 in both. Transformer Engine's fp4 copies of weights and "
        "activations are not counted",
    ),
    Replacement(
        "moe_token_dispatcher_type",
        "alltoall",
        "the flex dispatcher by alltoall: neither has parameters. Its buffers are not counted",
        lambda value: value == "flex",
    ),
    Replacement("moe_enable_deepep", False, "DeepEP by alltoall: neither has parameters. Its buffers are not counted"),
    Replacement(
        "cuda_graph_impl",
        "none",
        "CUDA graphs by plain calls: no parameters. The memory of a graph is not counted",
        lambda value: value not in (None, "none"),
    ),
    Replacement("nccl_ub", False, "NCCL's user buffers by plain ones of the same size"),
    Replacement(
        "tp_comm_overlap", False, "overlapped tensor-parallel communication by plain: its buffers are not counted"
    ),
)
# Kernels without parameters. The report does not depend on them.
KERNELS = {
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "use_te_activation_func": False,
    "delay_wgrad_compute": False,
    "fine_grained_activation_offloading": False,
}
# Megatron's names for the projections of latent attention to few channels.
DOWN_PROJECTIONS = ("q_down_proj", "kv_down_proj", "qkv_down_proj")
IRREPLACEABLE = {
    **dict.fromkeys(
        QUANTIZED_WEIGHTS, "its weights are Transformer Engine's tensors, which need a GPU. Rehearse without the flag"
    ),
    "use_megatron_fsdp": "Megatron-FSDP has its own buffers. Rehearse with --use-distributed-optimizer",
    "use_torch_fsdp2": "torch FSDP2 has no buffers to report. Rehearse with --use-distributed-optimizer",
    "moe_single_grouped_weight": "the grouped weight is a Transformer Engine tensor. Rehearse without the flag",
    "yaml_cfg": "a file of arguments bypasses the command line. Rehearse with Megatron's flags",
}


@contextlib.contextmanager
def transformer_engine_of_the_cluster() -> Iterator[None]:
    """Where it is not installed, let Megatron's checks of the flags find one that is new enough for each of them."""
    import megatron.training.arguments as arguments

    if importlib.util.find_spec("transformer_engine") is not None:
        yield
    else:
        with compat.temporarily(arguments, is_te_min_version=lambda *_, **__: True):
            yield


def refuse(args: Any) -> None:
    """Raise LionError for a flag that has no replacement on a machine without a GPU, or with state that is unknown."""
    if args.optimizer not in OPTIMIZERS:
        raise LionError(
            f"--optimizer {args.optimizer} cannot be rehearsed: its state is not known here. Rehearse with "
            f"{', '.join(OPTIMIZERS)}"
        )
    if args.optimizer == "adam" and getattr(args, "use_precision_aware_optimizer", False):
        raise LionError(
            "--use-precision-aware-optimizer cannot be rehearsed with --optimizer adam: its state is that of "
            "Transformer Engine's FusedAdam, which needs a GPU. Rehearse without the flag"
        )
    for dest, reason in IRREPLACEABLE.items():
        if getattr(args, dest, None):
            raise LionError(f"--{dest.replace('_', '-')} cannot be rehearsed: {reason}")


def replace(args: Any) -> list[str]:
    """Replace in ``args``, in place, what this machine lacks. Returns what was replaced, by what, for the report."""
    replaced = []
    for replacement in REPLACEMENTS:
        value = getattr(args, replacement.dest, None)
        if value is not None and replacement.applies(value):
            setattr(args, replacement.dest, replacement.value)
            flag = f"--{replacement.dest.replace('_', '-')} {value}".removesuffix(" True")
            replaced.append(f"{flag}: {replacement.meaning}")
    for dest, value in KERNELS.items():
        if hasattr(args, dest):
            setattr(args, dest, value)
    for flag in only_te_attention(args):
        replaced.append(f"{flag}: Transformer Engine's attention by Megatron's local one: neither has parameters")
        _let_attention_be_local()
    if getattr(args, "multi_latent_attention", False) and args.tensor_model_parallel_size > 1:
        _keep_down_projections_whole(args.rank)
    return replaced


def only_te_attention(args: Any) -> list[str]:
    """The flags in ``args`` that only Transformer Engine's attention can compute."""
    flags = [f"--context-parallel-size {args.context_parallel_size}"] if args.context_parallel_size > 1 else []
    return flags + (["--multi-latent-attention"] if getattr(args, "multi_latent_attention", False) else [])


def _let_attention_be_local() -> None:
    """Let Megatron's own attention be built where it cannot compute (0.19.2: dot_product_attention 58).

    It refuses context parallelism, and does not know the channels of multi-latent attention.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock = DotProductAttention.__init__

    def init(self: Any, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any) -> None:
        with compat.temporarily(config, context_parallel_size=1):
            stock(self, config, *args, **kwargs)

    DotProductAttention.__init__ = init


def _keep_down_projections_whole(rank: int) -> None:
    """Let each tensor-parallel rank have latent attention's projections down whole, as with Transformer Engine.

    Megatron cuts its own (0.19.2: multi_latent_attention 525 and 572).
    """
    from megatron.core.transformer import multi_latent_attention

    stock = multi_latent_attention.build_module
    alone = torch.distributed.new_group([rank])

    def build_module(spec: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("tp_comm_buffer_name") not in DOWN_PROJECTIONS:
            return stock(spec, *args, **kwargs)
        module = stock(spec, *args, **{**kwargs, "tp_group": alone})
        for param in module.parameters():  # as Transformer Engine's: the ranks add up the gradients of one weight
            param.sequence_parallel = kwargs["config"].sequence_parallel
            param.tensor_model_parallel = False
        return module

    multi_latent_attention.build_module = build_module
