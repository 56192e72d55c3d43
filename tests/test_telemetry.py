"""The sums that a step makes when asked: their definition, each kernel's against it, and that asking changes no bit."""

import math
from dataclasses import astuple

import pytest
import torch

from megatron_lion import Lion
from megatron_lion.kernels.foreach import lion_update_foreach_
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.precision import BlockLayout
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_
from tests.kernel_calls import run
from tests.test_kernels import LANGUAGE, problem
from tests.test_packed_kernels import BF16, FP32, INT8, compare_packed, packed

KERNELS = [lion_update_, lion_update_foreach_, lion_update_fused_]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sums_are_those_of_their_definition(kernel):
    m = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 1.0, -2.0])
    g = torch.tensor([0.5, -4.0, 4.0, 2.0, 0.0, -1.0, -3.0])  # c = (m + g) / 2: + - + + 0 0 -
    params = [torch.tensor([1.0, -7.0, 2.0, 0.0, 0.0, 3.0, 1.0])]
    telemetry = Telemetry()
    run(kernel, params, [g / 2], [m], **{**LANGUAGE, "beta1": 0.5}, grad_scale=2.0, telemetry=telemetry)
    assert telemetry == Telemetry(7, 14.5, 46.25, 13.5, 2, 2, float(params[0].abs().max()))
    assert telemetry.l2 == math.sqrt(46.25)
    assert (telemetry.agreement, telemetry.zero_share, telemetry.flipped_share) == (13.5 / 14.5, 2 / 7, 2 / 7)


def sums(kernel, call, **hyper):
    """The call's telemetry, from copies of its tensors."""
    copies = {name: [t.clone() if torch.is_tensor(t) else t for t in role] for name, role in call.items()}
    telemetry = Telemetry()
    run(kernel, **copies, **{**LANGUAGE, **hyper}, telemetry=telemetry)
    return telemetry


@pytest.mark.parametrize("mix", [(FP32, FP32, FP32), (BF16, BF16, BF16), ("remainder", BF16, INT8)], ids=str)
def test_the_fused_sums_are_the_references_and_the_same_on_any_number_of_threads(mix):
    generator = torch.Generator().manual_seed(7)
    lists = problem([600_001, 0, 5003, 33], FP32)
    lists[1][:] = [grad * torch.rand(grad.shape, generator=generator) for grad in lists[1]]
    call = packed(lists, *mix)
    expected = sums(lion_update_, call, grad_scale=0.3, beta1=0.5)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(sums(lion_update_fused_, call, grad_scale=0.3, beta1=0.5))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0].elements == 605_037
    assert 100 < expected.zeros < expected.flipped < expected.elements
    for ours, right in zip(astuple(found[0]), astuple(expected), strict=True):
        assert ours == (right if isinstance(right, int) else pytest.approx(right, rel=1e-12))
    assert found[0].linf_param == expected.linf_param


@pytest.mark.parametrize("mix", [(FP32, FP32, FP32), ("remainder", BF16, INT8), (FP32, FP32, INT8)], ids=str)
def test_elements_next_to_incomplete_blocks_are_counted_once(mix):
    """Vectors also compute what is next to the end of a row, a shard or a tensor."""
    numels = [*range(1, 70), 3001, 64]
    blocks = [BlockLayout(i % 50, 1 + 13 * (i % 9)) for i in range(len(numels))]
    call = packed(problem(numels, FP32), *mix, blocks)
    expected, found = sums(lion_update_, call, beta1=0.5), sums(lion_update_fused_, call, beta1=0.5)
    assert (found.elements, found.zeros, found.flipped) == (expected.elements, expected.zeros, expected.flipped)
    assert found.linf_param == expected.linf_param
    assert (found.l1, found.l2, found.inner) == pytest.approx((expected.l1, expected.l2, expected.inner), rel=1e-12)


@pytest.mark.parametrize("mix", [(FP32, FP32, FP32), ("remainder", BF16, INT8)], ids=str)
def test_asking_for_the_sums_changes_no_bit_of_the_step(mix):
    compare_packed(lion_update_fused_, packed(problem([5003, 31], FP32), *mix), telemetry=Telemetry())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(kernel, bad):
    call = {"masters": [torch.ones(40)], "grads": [torch.ones(40)], "exp_avgs": [torch.ones(40)]}
    call["masters"][0][3] = call["grads"][0][5] = bad
    telemetry = sums(kernel, call)
    assert telemetry.linf_param == math.inf
    assert telemetry.zeros == (1 if math.isnan(bad) else 0)
    assert telemetry.l1 == math.inf or math.isnan(telemetry.l1)


def test_merging_is_addition():
    a, b = Telemetry(3, 1.0, 2.0, 0.5, 1, 1, 4.0), Telemetry(5, 2.0, 1.0, -0.5, 0, 2, 3.0)
    a.merge(b)
    assert a == Telemetry(8, 3.0, 3.0, 0.0, 1, 3, 4.0)
    assert math.isnan(Telemetry().agreement)


@pytest.mark.parametrize("kernel", ["reference", "foreach", "fused"])
def test_lion_adds_every_parameter_of_a_step(kernel):
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 3))]
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.25, kernel=kernel)
    for param in params:
        param.grad = torch.full_like(param, -2.0)
    optimizer.telemetry = Telemetry()
    optimizer.step()
    assert optimizer.telemetry == Telemetry(10, 20.0, 40.0, 20.0, 0, 0, 1.5)


def test_without_the_sums_the_library_is_the_one_without_them(monkeypatch):
    """Off costs nothing: the other library, compiled without the sums, is called."""
    from megatron_lion.kernels import compiler

    loaded, load = [], compiler.load
    monkeypatch.setattr(compiler, "load", lambda *asked: loaded.append(asked) or load(*asked))
    for telemetry in (None, Telemetry()):
        run(lion_update_fused_, [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], **LANGUAGE, telemetry=telemetry)
    assert loaded == [(compiler.SOURCE,), (compiler.SOURCE, "TELEMETRY")]
