"""A GPT that computes the gradients of all data-parallel ranks in one pass.

The layers are those of Megatron's GPT in the recipe tiny_gpt: pre-norm, biases, tanh GELU, learned positions, tied
embeddings, no dropout. Every weight is expanded to one copy for each rank, which shares its memory. So the gradient of
the mean loss with respect to the copies is what each rank would send, divided by the number of ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model, and of the batch of one rank."""

    layers: int
    hidden: int
    heads: int = 4
    length: int = 64
    sequences: int = 2
    vocabulary: int = 512

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        hidden = self.hidden
        found: dict[str, tuple[int, ...]] = {
            "embedding": (self.vocabulary, hidden),
            "positions": (self.length, hidden),
        }
        for layer in range(self.layers):
            for name, rows, columns in (
                ("qkv", 3 * hidden, hidden),
                ("attention", hidden, hidden),
                ("up", 4 * hidden, hidden),
                ("down", hidden, 4 * hidden),
            ):
                found |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
            for name in ("norm1", "norm2"):
                found |= {f"{layer}.{name}.weight": (hidden,), f"{layer}.{name}.bias": (hidden,)}
        return found | {"norm.weight": (hidden,), "norm.bias": (hidden,)}

    def initialize_(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """As Megatron: N(0, 0.02), smaller by sqrt(2 layers) where a residual branch ends."""
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            ends_branch = "attention" in name or "down" in name
            scale = math.sqrt(2 * self.layers) if ends_branch else 1.0
            parameter.normal_(0.0, INIT_STD / scale, generator=generator)


def gradients(shape: Shape, weights: Mapping[str, Tensor], tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss, and for each of ``weights`` its gradient on each rank, with a first dimension of ranks.

    ``tokens`` is int64 [ranks, sequences, length + 1]. The mean is over all ranks, so the sum of the gradients of the
    ranks is the gradient of the loss.
    """
    ranks = len(tokens)
    copies = {name: weight.detach().expand(ranks, *weight.shape).requires_grad_() for name, weight in weights.items()}
    loss = mean_loss(shape, copies, tokens)
    return loss.detach(), dict(zip(copies, torch.autograd.grad(loss, list(copies.values())), strict=True))


def mean_loss(shape: Shape, copies: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The mean cross-entropy, in nats per token. ``copies`` have a first dimension of ranks."""
    ranks, sequences, _ = tokens.shape
    rows = torch.arange(ranks).view(-1, 1, 1) * shape.vocabulary + tokens[..., :-1]
    embedded = functional.embedding(rows, copies["embedding"].flatten(0, 1)) + copies["positions"].unsqueeze(1)
    x = embedded.flatten(1, 2)  # [ranks, tokens of a rank, hidden]
    for layer in range(shape.layers):
        x = x + _attention(shape, copies, f"{layer}.", x, sequences)
        up = _linear(copies, f"{layer}.up", _norm(copies, f"{layer}.norm2", x))
        x = x + _linear(copies, f"{layer}.down", functional.gelu(up, approximate="tanh"))
    logits = torch.bmm(_norm(copies, "norm", x), copies["embedding"].transpose(1, 2))
    return functional.cross_entropy(logits.flatten(0, 1), tokens[..., 1:].flatten())


def _attention(shape: Shape, copies: Mapping[str, Tensor], prefix: str, x: Tensor, sequences: int) -> Tensor:
    qkv = _linear(copies, f"{prefix}qkv", _norm(copies, f"{prefix}norm1", x))
    heads = qkv.view(-1, shape.length, 3, shape.heads, shape.hidden // shape.heads).permute(2, 0, 3, 1, 4)
    query, key, value = heads.flatten(1, 2)  # [ranks x sequences x heads, length, channels]
    mask = torch.full((shape.length, shape.length), -math.inf).triu(1)
    # Short sequences: faster on a CPU than the fused attention.
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5).softmax(-1)
    mixed = torch.bmm(scores, value).view(-1, shape.heads, shape.length, shape.hidden // shape.heads)
    return _linear(copies, f"{prefix}attention", mixed.transpose(1, 2).reshape(x.shape))


def _linear(copies: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(copies[f"{name}.bias"].unsqueeze(1), x, copies[f"{name}.weight"].transpose(1, 2))


def _norm(copies: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    normal = functional.layer_norm(x, x.shape[-1:])
    return torch.addcmul(copies[f"{name}.bias"].unsqueeze(1), normal, copies[f"{name}.weight"].unsqueeze(1))
