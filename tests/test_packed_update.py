"""The reference step on packed state: the fp32 step between exact unpacking and packing."""

import pytest
import torch

from megatron_lion.precision import BlockLayout, dequantize, join_master, quantize, split_master
from megatron_lion.update import lion_step
from tests.kernel_calls import reference

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70), (64,), (0, 5), ()])
def test_remainders_and_codes_are_unpacked_stepped_and_packed(shape: tuple[int, ...], grad_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    master, momentum, grad = (torch.randn(shape) for _ in range(3))
    grad = grad.to(grad_dtype)
    param, remainder = split_master(master)
    layout = BlockLayout.of_whole(master)
    codes, scales = quantize(momentum, layout)
    expected_master, expected_momentum = lion_step(master, grad * 0.5, dequantize(codes, scales, layout), **HYPER)
    if grad_dtype == torch.bfloat16:  # the product with the clip factor is not rounded to bf16
        expected_master, expected_momentum = lion_step(
            master, grad.float() * 0.5, dequantize(codes, scales, layout), **HYPER
        )
    reference([param], [grad], [codes], **HYPER, grad_scale=0.5, remainders=[remainder], scales=[scales])
    assert torch.equal(join_master(param, remainder), expected_master)
    for stored, expected in zip((codes, scales), quantize(expected_momentum, layout), strict=True):
        assert torch.equal(stored, expected)


def test_masters_equal_an_fp32_run_bit_for_bit_over_a_thousand_steps() -> None:
    """A run with remainders against one with fp32 masters, each seeing gradients that depend on its bf16 weights."""
    torch.manual_seed(2)
    target, start = torch.randn(4, 33), torch.randn(4, 33)
    master, momentum = start.clone(), torch.zeros(4, 33)
    param, remainder = split_master(start)
    packed_momentum = torch.zeros(4, 33)
    for _ in range(1000):
        grad = split_master(master)[0].float() - target
        reference([master], [grad], [momentum], **HYPER)
        reference([param], [param.float() - target], [packed_momentum], **HYPER, remainders=[remainder])
        assert torch.equal(join_master(param, remainder), master)
    assert torch.equal(packed_momentum, momentum)
    assert not torch.equal(master, param.float()), "the remainder matters"


def test_a_shard_with_its_layout_equals_the_whole() -> None:
    torch.manual_seed(3)
    shape, cut = (5, 100), 164  # 164 = 1 * 100 + 64: a block's beginning
    master, grads = torch.randn(shape), torch.randn(50, *shape)
    runs = []
    for pieces in ([(0, 500)], [(0, cut), (cut, 500)]):
        blocks = [BlockLayout(start, 100) for start, _ in pieces]
        params = [master.flatten()[start:stop].clone() for start, stop in pieces]
        packed = [quantize(torch.zeros_like(param), layout) for param, layout in zip(params, blocks, strict=True)]
        for grad in grads:
            reference(
                params,
                [grad.flatten()[start:stop] for start, stop in pieces],
                [codes for codes, _ in packed],
                **HYPER,
                scales=[scales for _, scales in packed],
                blocks=blocks,
            )
        runs.append(torch.cat(params))
    assert torch.equal(runs[0], runs[1])
