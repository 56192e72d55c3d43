"""What Megatron's optimizers ask of ``ShardedLion``: scaled gradients, model copies, state before the first step."""

import pytest
import torch

from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.kernels import KERNELS
from megatron_lion.update import lion_step
from tests.test_lion import BF16, HYPER, make_params, run, same_bits


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_gradients_are_scaled_and_model_copies_written(kernel):
    """The clip factor is folded in, and the step writes bf16 parameters."""
    params = make_params()
    copies = {params[0]: torch.zeros(params[0].shape, dtype=BF16)}
    optimizer = ShardedLion(params, **HYPER, kernel=kernel)
    optimizer.grad_scale, optimizer.model_copies = 0.37, copies
    run(optimizer, params, steps=1)
    for param, start in zip(params, make_params(), strict=True):
        hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
        expected, exp_avg = lion_step(start.detach(), param.grad * 0.37, torch.zeros_like(start), **hyper)
        assert same_bits(param, expected)
        assert same_bits(optimizer.state[param]["exp_avg"], exp_avg)
    assert same_bits(copies[params[0]], params[0].detach().to(BF16))


def test_state_before_the_first_gradient_is_zero_momentum():
    """init_state adds the missing state and keeps what is there; no parameter changes."""
    params = make_params(BF16)
    optimizer = ShardedLion(params)
    run(optimizer, params[:1], steps=1)
    kept = optimizer.state[params[0]]["exp_avg"].clone()
    before, versions = [param.detach().clone() for param in params], [param._version for param in params]
    optimizer.init_state()
    assert same_bits(optimizer.state[params[0]]["exp_avg"], kept)
    for param in params[1:]:
        assert same_bits(optimizer.state[param]["exp_avg"], torch.zeros_like(param))
    assert all(same_bits(old, new) for old, new in zip(before, params, strict=True))
    assert [param._version for param in params] == versions


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "fused"])
def test_fp16_parameters_with_fp32_masters(kernel):
    """Model copies in fp16, which the fused kernel does not write."""
    halves, masters = make_params(torch.float16), make_params(torch.float16)
    masters = [torch.nn.Parameter(param.detach().float()) for param in masters]
    optimizer = ShardedLion(halves, **HYPER, kernel=kernel, momentum_dtype="fp32", master_weights="fp32")
    optimizer.use_decoupled_grad = True
    exact = ShardedLion(masters, **HYPER)
    for _ in range(3):
        for half, master in zip(halves, masters, strict=True):
            half.decoupled_grad = master.grad = torch.randn(half.shape)
        optimizer.step()
        exact.step()
    for half, master in zip(halves, masters, strict=True):
        assert same_bits(half, master.detach().half())
