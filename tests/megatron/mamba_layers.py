"""Mamba-2 in plain torch, for Megatron's MambaMixer on a CPU, where ``mamba_ssm`` and ``causal_conv1d`` cannot run.

Only what a training pass calls. A sequential scan: slow, and of the layer's definition.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class GatedRMSNorm(torch.nn.Module):
    """``mamba_ssm``'s norm over groups of channels, without a gate."""

    def __init__(
        self, hidden: int, eps: float = 1e-5, group_size: int | None = None, device: Any = None, dtype: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden
        self.weight = torch.nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """As Megatron's subclass of ``mamba_ssm``'s norm has it (0.19.2: mamba_mixer 116)."""
        from megatron.core import parallel_state
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group(), "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def conv1d_and_scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, *args: Any, headdim: int, ngroups: int = 1, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """``mamba_split_conv1d_scan_combined``: [batch, sequence, channels of z, x, B, C and dt] to the gated output."""
    heads, channels, width = A.shape[0], *conv1d_weight.shape
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, channels, heads], -1)
    xbc = functional.conv1d(
        xbc.transpose(1, 2), conv1d_weight.unsqueeze(1), conv1d_bias, padding=width - 1, groups=channels
    )
    xbc = functional.silu(xbc[..., : z.shape[1]].transpose(1, 2)).float()
    x, b, c = xbc.split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (b, c))
    dt = functional.softplus(dt.float() + dt_bias)
    state, outputs = x.new_zeros(*x[:, 0].shape, b.shape[-1]), []
    for step in range(x.shape[1]):
        decay = torch.exp(dt[:, step] * A)[..., None, None]
        state = state * decay + (dt[:, step, :, None] * x[:, step])[..., None] * b[:, step, :, None, :]
        outputs.append((state * c[:, step, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1) + x * D.float()[:, None]
    return (y.flatten(-2) * functional.silu(z.float())).to(zxbcdt.dtype)


def install() -> None:
    """Let Megatron's MambaMixer find them."""
    from megatron.core.ssm import mamba_mixer

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.RMSNormGated = mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
    mamba_mixer.mamba_split_conv1d_scan_combined = conv1d_and_scan
