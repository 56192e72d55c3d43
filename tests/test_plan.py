"""A step of Lion reuses the plan of the last one exactly as long as a new plan would be the same."""

import gc
import weakref

import pytest
import torch

from megatron_lion import kernels, plan
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.kernels.digits import lion_update_with_digits_
from megatron_lion.telemetry import Telemetry
from megatron_lion.update import lion_update_
from tests.test_kernels import assert_same_bits

FP32, BF16 = torch.float32, torch.bfloat16


def made(monkeypatch, dtype=FP32, **settings):
    """A Lion that has made one step, its parameters, and the list of the plans that it makes."""
    plans = []
    monkeypatch.setattr(kernels, "choose", lambda *args, **options: lion_update_)
    monkeypatch.setattr("megatron_lion.lion.GroupPlan", lambda *args: plans.append(1) or plan.GroupPlan(*args))
    params = [torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype)) for size in (64, 5, 33)]
    lion = ShardedLion(params, lr=1e-2, weight_decay=0.1, **settings)
    step(lion, params)
    assert len(plans) == 1
    return lion, params, plans


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]


def step(lion, params, seed=0):
    for param, grad in zip(params, gradients(params, seed), strict=True):
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)
    lion.step()


def same_gradients(lion, params):
    pass


def views(lion, params):
    for param in params:
        param.grad = param.grad.view(-1)


def other_rate(lion, params):
    lion.param_groups[0]["lr"] = 3e-3


@pytest.mark.parametrize("change", [same_gradients, views, other_rate])
def test_a_plan_is_reused(change, monkeypatch):
    """With gradients in new tensors at the same addresses, as Megatron makes them in each step, and for other rates."""
    lion, params, plans = made(monkeypatch)
    expected = [param.detach().clone().requires_grad_() for param in params]
    other = ShardedLion(expected, lr=1e-2, weight_decay=0.1)
    other.load_state_dict(lion.state_dict())
    for optimizer, of in ((lion, params), (other, expected)):
        for param in of if of is expected else ():
            param.grad = torch.empty_like(param)
        change(optimizer, of)
    other._forget_plans()
    plans.clear()
    step(lion, params, 1)
    assert not plans
    step(other, expected, 1)
    assert_same_bits([param.detach() for param in params], [param.detach() for param in expected])


def moved_gradient(lion, params):
    params[1].grad = params[1].grad.clone()


def no_gradient(lion, params):
    params[1].grad = None


def moved_parameter(lion, params):
    params[0].data = params[0].data.clone()


def moved_storage(lion, params):
    """As the offload of optimizer state does."""
    storage = lion.state[params[0]]["exp_avg"].untyped_storage()
    size, keep = storage.size(), lion.state[params[0]]["exp_avg"].clone()
    storage.resize_(0)
    lion.kept = torch.ones(size // 4)  # takes the freed memory
    storage.resize_(size)
    lion.state[params[0]]["exp_avg"].copy_(keep)


def replaced_momentum(lion, params):
    lion.state[params[2]]["exp_avg"] = torch.ones(33)


def replaced_state(lion, params):
    lion.state[params[2]] = {"exp_avg": torch.ones(33)}


def loaded_state(lion, params):
    lion.load_state_dict(lion.state_dict())


def another_parameter(lion, params):
    params.append(torch.nn.Parameter(torch.ones(7)))
    lion.param_groups[0]["params"].append(params[-1])


def a_parameter_less(lion, params):
    lion.param_groups[0]["params"].pop()


def telemetry(lion, params):
    lion.telemetry = Telemetry()


def model_copies(lion, params):
    lion.model_copies = {param: param.detach().bfloat16() for param in params}


CHANGES = [
    moved_gradient,
    no_gradient,
    moved_parameter,
    moved_storage,
    replaced_momentum,
    replaced_state,
    loaded_state,
    another_parameter,
    a_parameter_less,
    telemetry,
    model_copies,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compare", ["torch", "python"])
def test_a_plan_that_no_longer_holds_is_made_again(change, compare, monkeypatch):
    if compare == "python":  # as in torch without CUDA
        monkeypatch.setattr(plan, "_are_at", plan._compare_addresses)
    lion, params, plans = made(monkeypatch)
    change(lion, params)
    plans.clear()
    before = [param.detach().clone() for param in params]
    states = [{key: value.clone() for key, value in lion.state.get(param, {}).items()} for param in params]
    step_in_place(lion, params)
    assert plans
    for param, old, state in zip(params, before, states, strict=True):
        if param.grad is not None and any(param is one for one in lion.param_groups[0]["params"]):
            momentum = state.get("exp_avg", torch.zeros_like(old))
            sign = torch.sign(momentum * 0.9 + param.grad * (1.0 - 0.9))
            assert_same_bits([param.detach()], [old - (sign + old * 0.1) * 1e-2])


def step_in_place(lion, params):
    for param in params:
        if param.grad is None and len(params) == 4:
            param.grad = torch.ones_like(param)
    lion.step()


def with_new_digits(lion, params):
    """Make a step that leaves digits for ``params``, and return these."""
    lion.digits = {param: torch.zeros(param.shape, dtype=torch.uint8) for param in params}
    lion.step()
    return list(lion.digits.values())


def test_new_digits_are_written_by_the_plan_of_the_last_step_and_are_free_after_it(monkeypatch):
    lion, params, plans = made(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda *args, digits: lion_update_with_digits_ if digits else lion_update_)
    with_new_digits(lion, params)
    assert len(plans) == 2, "without digits, then with them"
    digits = with_new_digits(lion, params)
    assert len(plans) == 2 and all(one.any() for one in digits)
    some = with_new_digits(lion, params[:2])
    assert len(plans) == 3 and all(one.any() for one in some), "for other parameters"
    used = weakref.ref(lion.digits[params[0]])
    lion.digits = {}
    del some
    gc.collect()
    assert used() is None
    step(lion, params)
    assert len(plans) == 4


def test_gradients_are_free_between_steps(monkeypatch):
    lion, params, _ = made(monkeypatch)
    step(lion, params)
    gradient = weakref.ref(params[0].grad)
    lion.zero_grad(set_to_none=True)
    gc.collect()
    assert gradient() is None


@pytest.mark.parametrize("form", ["transposed", "another dtype"])
def test_a_gradient_of_another_form_at_the_same_address_is_not_taken_for_the_old_one(form, monkeypatch):
    plans = []
    monkeypatch.setattr("megatron_lion.lion.GroupPlan", lambda *args: plans.append(1) or plan.GroupPlan(*args))
    param = torch.nn.Parameter(torch.zeros(4, 4))
    lion = ShardedLion([param], lr=1e-2)
    lion.use_decoupled_grad = True
    param.decoupled_grad = torch.randn(4, 4)
    lion.step()
    lion.step()
    assert len(plans) == 1
    param.decoupled_grad = param.decoupled_grad.t() if form == "transposed" else param.decoupled_grad.view(BF16)[:, :4]
    lion.step()
    assert len(plans) == 2
