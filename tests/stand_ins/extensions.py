"""Functions of Transformer Engine's and Apex's extensions, in torch. Arguments are theirs.

Those for lists of tensors, and Transformer Engine's layer norm, which Megatron uses behind its local layers too.
"""

from typing import Any

import torch

Lists = list[list[torch.Tensor]]


def l2norm(chunk_size: int, noop: Any, lists: Lists, per_tensor: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all tensors of the one list as a tensor of one element, and nothing for each tensor."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), torch.empty(0)


def scale(chunk_size: int, noop: Any, lists: Lists, factor: Any) -> None:
    """Write each tensor of the first list, times ``factor``, into that of the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def adam(
    chunk_size: int, noop: Any, lists: Lists, lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, weight_decay: float, *_: Any,
) -> None:  # fmt: skip
    """AdamW. The lists are gradients, parameters, and both moments."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, param, exp_avg, exp_avg_sq in zip(*lists, strict=True):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (exp_avg / first) / ((exp_avg_sq / second).sqrt() + eps)
        param.sub_(lr * (update + weight_decay * param))


def layernorm_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *_: Any) -> Any:
    """The output, the means and the reciprocal deviations."""
    return torch.native_layer_norm(x, list(weight.shape), weight, bias, eps)


def layernorm_bwd(
    dy: torch.Tensor, x: torch.Tensor, means: torch.Tensor, deviations: torch.Tensor, weight: torch.Tensor, *_: Any
) -> Any:
    """The gradients of input, weight and bias."""
    bias, wanted = torch.zeros_like(weight), [True, True, True]
    shape = list(weight.shape)
    return torch.ops.aten.native_layer_norm_backward(dy, x, shape, means, deviations, weight, bias, wanted)
