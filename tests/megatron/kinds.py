"""Run under torchrun in the place of ``pretrain_gpt.py``, to pretrain a model that no flag of Megatron's makes.

    torchrun tests/megatron/kinds.py WHAT <Megatron's flags>

WHAT is ``frozen`` (some parameters take no gradient), ``frozen-layer`` (those of the first layer take none),
``vectors`` (only norms and biases take one), ``context-parallel`` (Megatron's own local attention runs without
Transformer Engine but refuses a sequence that is split over ranks; here it gathers keys and values first), ``hybrid``
(HybridModel from ``--hybrid-layer-pattern``, of Megatron's local layers), ``mamba`` (the same with Mamba layers, in
plain torch), ``multi-token`` (``--mtp-num-layers``), or ``learning-rates`` (layer norms at a tenth of --lr, through
Megatron's own overrides for parameters).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

import megatron_lion

megatron_lion.register()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration.compat import temporarily  # noqa: E402
from tests.megatron import mamba_layers  # noqa: E402

FROZEN = ("embedding.word_embeddings", "mlp.linear_fc1", "self_attention.linear_proj.bias")
MATRICES = ("embeddings", "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")


def freeze(parts: tuple[str, ...]) -> None:
    """Parameters with one of ``parts`` in their names are trained no further, as when a model is adapted in part."""
    stock = GPTModel.__init__

    def __init__(self: GPTModel, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        for name, param in self.named_parameters():
            param.requires_grad = not any(part in name for part in parts)

    GPTModel.__init__ = __init__


class Gather(torch.autograd.Function):
    """Keys or values of the whole sequence, [sequence, ...], from every context-parallel rank's two pieces of it."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        group = mpu.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        first, last = zip(*(piece.chunk(2) for piece in parts), strict=True)
        return torch.cat([*first, *reversed(last)])  # rank r of n holds the pieces r and 2 n - 1 - r

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = mpu.get_context_parallel_group()
        whole = gradient.contiguous()
        torch.distributed.all_reduce(whole, group=group)
        pieces = whole.chunk(2 * group.size())
        return torch.cat([pieces[group.rank()], pieces[-1 - group.rank()]])


class GatheringAttention(DotProductAttention):
    """Megatron's local attention over the keys and values of all context-parallel ranks."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with temporarily(config, context_parallel_size=1):
            super().__init__(config, *args, **kwargs)

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(query, Gather.apply(key), Gather.apply(value), *args, **kwargs)


def split_sequence() -> None:
    """Layers whose attention works on a sequence split over ranks."""
    LocalSpecProvider.core_attention = lambda self: GatheringAttention


def hybrid() -> None:
    """HybridModel in the place of GPTModel, from Megatron's local layers and torch's norms."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.post_training.modelopt.hybrid import model_specs
    from megatron.training import argument_utils

    def config(args: Any) -> Any:
        made = argument_utils.hybrid_config_from_args(args)
        made.hybrid_stack_spec = model_specs.get_hybrid_stack_modelopt_spec(local_core_attention=True)
        return made

    hybrid_block.TENorm = model_specs.TENorm = model_specs.Norm = WrappedTorchNorm
    argument_utils.gpt_config_from_args = config


def mamba() -> None:
    """HybridModel with Mamba layers."""
    hybrid()
    mamba_layers.install()


def slow_norms() -> None:
    """Give layer norms a tenth of the learning rate."""
    import megatron.training.training as training
    from megatron.core.optimizer import ParamGroupOverride, ParamKey

    stock = training.get_megatron_optimizer_config

    def get_megatron_optimizer_config(args: Any) -> Any:
        config, overrides = stock(args)
        norms = ParamKey(name="*norm*")
        slower = ParamGroupOverride(max_lr=args.lr / 10, min_lr=args.min_lr / 10)
        return config, {**(overrides or {}), norms: slower}

    training.get_megatron_optimizer_config = get_megatron_optimizer_config


PREPARE: dict[str, Callable[[], None]] = {
    "frozen": lambda: freeze(FROZEN),
    "frozen-layer": lambda: freeze(("layers.0.",)),
    "vectors": lambda: freeze(MATRICES),
    "context-parallel": split_sequence,
    "hybrid": hybrid,
    "mamba": mamba,
    "learning-rates": slow_norms,
    "multi-token": lambda: None,
}


def main() -> None:
    PREPARE[sys.argv.pop(1)]()
    pretrain_gpt.LEFT_OUT = ()
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
