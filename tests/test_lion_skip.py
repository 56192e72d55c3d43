"""``ShardedLion.skip``: a skipped step leaves parameters and state as they were, also the first."""

import pytest
import torch

from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.kernels import KERNELS
from tests.test_lion import HYPER, assert_same, make_params, run, snapshot


def skipping(optimizer, params, bad=float("nan")):
    """One step that is skipped, on gradients that are not finite."""
    optimizer.skip = torch.ones(1, dtype=torch.int32)
    for param in params:
        param.grad = torch.full_like(param, bad)
    optimizer.step()
    optimizer.skip.zero_()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("momentum_init", ["zero", "gradient"])
@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16", "int8"])
def test_a_skipped_first_step_is_a_step_never_made(kernel, momentum_init, momentum_dtype):
    skipped, straight = make_params(), make_params()
    stored = {"momentum_init": momentum_init, "momentum_dtype": momentum_dtype, "kernel": kernel}
    one, other = ShardedLion(skipped, **HYPER, **stored), ShardedLion(straight, **HYPER, **stored)
    skipping(one, skipped)
    run(one, skipped, steps=2)
    run(other, straight, steps=2)
    assert_same(snapshot(one, skipped), snapshot(other, straight))


def test_a_skipped_step_does_not_round_momentum_that_waits_for_int8():
    params = make_params()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype="int8")
    optimizer.init_state()
    for param in params:
        optimizer.set_scaled_state(param, "exp_avg", param.detach() / 3)
    before = snapshot(optimizer, params)
    skipping(optimizer, params)
    assert_same(before, snapshot(optimizer, params))
