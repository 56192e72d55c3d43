"""Lion as an ordinary torch optimizer, and what it refuses."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion import LionError
from megatron_lion.lion import Lion
from megatron_lion.update import lion_step

FP32, BF16 = torch.float32, torch.bfloat16
KERNELS = ("auto", "reference", "foreach", "fused")
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def same_bits(a, b):
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(kind), b.detach().view(kind))


def make_params(dtype=FP32, seed=0, shapes=((3, 5), (7,), ())):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, seed):
    """Random gradients, a fifth of their elements zero; the same for the same seed and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        keep = torch.rand(param.shape, generator=generator) > 0.2
        param.grad = (grad * keep).to(param.dtype)


def run(optimizer, params, steps, seed=1):
    for step in range(steps):
        give_gradients(params, seed=1000 * seed + step)
        optimizer.step()


def snapshot(optimizer, params):
    """A deep copy of all that a refused request must leave alone."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = [{k: v.clone() for k, v in optimizer.state.get(param, {}).items()} for param in params]
    return copy.deepcopy(groups), state, [param.detach().clone() for param in params]


def assert_same(before, after):
    assert before[0] == after[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert old.keys() == new.keys()
        assert all(same_bits(old[key], new[key]) for key in old)
    assert all(same_bits(old, new) for old, new in zip(before[2], after[2], strict=True))


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16, torch.float16])
def test_a_step_is_one_application_of_the_rule_from_zero_momentum(kernel, dtype):
    """With the betas given: Megatron's own ``--optimizer lion`` silently uses Adam's."""
    if kernel == "fused" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("fused refuses this dtype")
    params = make_params(dtype)
    optimizer = Lion(params, **HYPER, kernel=kernel)
    run(optimizer, params, steps=1)
    for param, start in zip(params, make_params(dtype), strict=True):
        zero = torch.zeros_like(start)
        hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
        expected, exp_avg = lion_step(start.detach(), param.grad, zero, **hyper)
        assert same_bits(param, expected.to(dtype))
        assert set(optimizer.state[param]) == {"exp_avg"}
        assert same_bits(optimizer.state[param]["exp_avg"], exp_avg.to(dtype))


def test_nothing_but_the_step_changes_a_parameter():
    """Defect of lion-pytorch: its autotuning ran the kernel on live parameters before the first step."""
    params = make_params()
    before, versions = [p.detach().clone() for p in params], [p._version for p in params]
    optimizer = Lion(params, **HYPER)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": make_params(seed=9)})
    optimizer.zero_grad()
    optimizer.step()
    assert all(same_bits(old, new) for old, new in zip(before, params, strict=True))
    assert [p._version for p in params] == versions


@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_leaves_the_gradients_as_they_were(maximize):
    params = make_params()
    optimizer = Lion(params, **HYPER, maximize=maximize)
    run(optimizer, params, steps=1)
    grads, versions = [p.grad.clone() for p in params], [p.grad._version for p in params]
    optimizer.step()
    assert all(same_bits(old, p.grad) for old, p in zip(grads, params, strict=True))
    assert [p.grad._version for p in params] == versions


def test_the_closure_runs_once_with_gradients_before_the_update():
    (param,) = make_params(shapes=((4,),))
    optimizer, start, calls = Lion([param], lr=0.1), param.detach().clone(), []

    def closure():
        calls.append(param.detach().clone())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert same_bits(calls[0], start)
    assert loss.item() == (start**2).sum().item()
    assert same_bits(param, start - torch.sign(start) * 0.1)


def test_a_step_without_closure_returns_none():
    assert Lion(make_params()).step() is None


@pytest.mark.parametrize("momentum_init", ["zero", "gradient"])
def test_maximize_is_descent_on_negated_gradients(momentum_init):
    up, down = make_params(), make_params()
    ascent = Lion(up, **HYPER, maximize=True, momentum_init=momentum_init)
    descent = Lion(down, **HYPER, momentum_init=momentum_init)
    for step in range(3):
        run(ascent, up, steps=1, seed=step)
        for a, b in zip(up, down, strict=True):
            b.grad = -a.grad
        descent.step()
    assert all(same_bits(a, b) for a, b in zip(up, down, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_group_has_its_own_hyperparameters(kernel):
    """One optimizer of several groups equals one optimizer for each."""
    own = [
        {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.0},
        {"lr": 1e-1, "betas": (0.0, 0.5), "weight_decay": 1.0, "momentum_init": "gradient"},
        {"lr": 1e-1, "betas": (0.5, 0.0), "weight_decay": 1.0, "maximize": True},
        {},
    ]
    together, apart = [make_params() for _ in own], [make_params() for _ in own]
    groups = [{"params": params, **hyper} for params, hyper in zip(together, own, strict=True)]
    one = Lion(groups, lr=0.5, kernel=kernel)
    each = [Lion(params, **{"lr": 0.5, **hyper}) for params, hyper in zip(apart, own, strict=True)]
    together, apart = list(itertools.chain(*together)), list(itertools.chain(*apart))
    for step in range(4):
        give_gradients(together, seed=step)
        one.step()
        give_gradients(apart, seed=step)
        for optimizer in each:
            optimizer.step()
    assert all(same_bits(a, b) for a, b in zip(together, apart, strict=True))


def test_parameters_without_gradient_are_untouched_and_have_no_state():
    """Not even weight decay; a gradient of zeros is a gradient, and decays."""
    missing, zero = make_params(shapes=((4,), (4,)))
    missing_before, zero_before = missing.detach().clone(), zero.detach().clone()
    zero.grad = torch.zeros_like(zero)
    optimizer = Lion([missing, zero], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert same_bits(missing, missing_before)
    assert missing not in optimizer.state
    assert same_bits(zero, zero_before - (zero_before * 0.5) * 0.5)
    assert set(optimizer.state_dict()["state"]) == {1}


def test_a_parameter_whose_gradient_comes_late_starts_from_zero_momentum():
    params, late = make_params(), make_params(seed=5, shapes=((4,),))
    optimizer = Lion(params + late, **HYPER)
    run(optimizer, params, steps=3)
    run(optimizer, late, steps=1)
    assert same_bits(optimizer.state[late[0]]["exp_avg"], late[0].grad * (1.0 - 0.95))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_momentum_init_gradient_steps_along_the_first_gradient(dtype):
    """Lemma 6 of the paper: m_0 = g_1, so c_1 = g_1 and m_1 = g_1, up to rounding; here exact by dyadic betas."""
    param = Parameter(torch.zeros(4, dtype=dtype))
    param.grad = torch.tensor([0.75, -0.25, 0.0, 3.0], dtype=dtype)
    optimizer = Lion([param], lr=0.5, betas=(0.5, 0.75), momentum_init="gradient")
    optimizer.step()
    assert param.tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert optimizer.state[param]["exp_avg"].tolist() == [0.75, -0.25, 0.0, 3.0]
    param.grad = -param.grad
    optimizer.step()  # c = 0: the momentum of the proof remembers g_1 in full
    assert param.tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert optimizer.state[param]["exp_avg"].tolist() == [0.375, -0.125, 0.0, 1.5]


def test_momentum_init_gradient_does_not_keep_the_gradient_itself():
    """A momentum that shared the gradient's memory would be cleared by zero_grad or changed by the next backward."""
    (param,) = make_params(shapes=((4,),))
    param.grad = torch.ones(4)
    optimizer = Lion([param], lr=0.5, betas=(0.5, 0.75), momentum_init="gradient")
    optimizer.step()
    param.grad.zero_()
    assert optimizer.state[param]["exp_avg"].tolist() == [1.0] * 4


def test_momentum_init_gradient_costs_nothing_after_the_first_step():
    operations = []
    for momentum_init in ("gradient", "zero"):
        params = make_params()
        optimizer = Lion(params, **HYPER, momentum_init=momentum_init)
        run(optimizer, params, steps=1)
        with Operations() as made:
            optimizer.step()
        operations.append(made.names)
    assert operations[0] == operations[1]


class Operations(TorchDispatchMode):
    """Records the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_momentum_init_zero_keeps_a_share_of_the_first_gradient():
    param = Parameter(torch.zeros(2))
    param.grad = torch.tensor([4.0, -8.0])
    optimizer = Lion([param], lr=0.5, betas=(0.5, 0.75))
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].tolist() == [1.0, -2.0]


def test_a_learning_rate_schedule_is_followed():
    """Guards against a learning rate that is read once and kept, as a captured CUDA graph keeps it."""
    (param,) = make_params(shapes=((5,),))
    optimizer = Lion([param], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.5, 0.125, 0.0)[step])
    for lr in (0.5, 0.25, 0.0625, 0.0):
        before = param.detach().clone()
        param.grad = torch.ones(5)
        optimizer.step()
        assert same_bits(param, before - lr)
        if lr:
            scheduler.step()


def test_hyperparameters_set_in_the_group_act_from_the_next_step():
    changed, fresh = make_params(), make_params()
    optimizer = Lion(changed, lr=0.5, weight_decay=0.0, betas=(0.1, 0.2))
    optimizer.param_groups[0].update(HYPER)
    run(optimizer, changed, steps=3)
    run(Lion(fresh, **HYPER), fresh, steps=3)
    assert all(same_bits(a, b) for a, b in zip(changed, fresh, strict=True))


def test_lion_learns_a_linear_regression():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator)
    targets = inputs @ torch.randn(8, generator=generator)
    weight = Parameter(torch.zeros(8))
    optimizer = Lion([weight], lr=2e-2)
    losses = []
    for step in range(300):
        batch = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        loss = ((inputs[batch] @ weight - targets[batch]) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.01 * sum(losses[:8])


# --- saved state ------------------------------------------------------------------------------------------------------


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("made_with", [HYPER, {"lr": 0.7, "betas": (0.1, 0.2), "momentum_init": "gradient"}])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_resumed_run_equals_an_uninterrupted_one(dtype, made_with):
    """Bit for bit, also into an optimizer made with other hyperparameters: the saved ones count."""
    whole = make_params(dtype)
    straight = Lion(whole, **HYPER)
    run(straight, whole, steps=5, seed=1)
    saved = through_a_file({"optimizer": straight.state_dict(), "params": whole})
    run(straight, whole, steps=5, seed=2)

    params = [Parameter(param.detach().clone()) for param in saved["params"]]
    resumed = Lion(params, **made_with)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, params, steps=5, seed=2)
    assert_same(snapshot(straight, whole), snapshot(resumed, params))


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(other):
    theirs = make_params()
    foreign = other(theirs, lr=0.1)
    run(foreign, theirs, steps=2)
    params = make_params()
    optimizer = Lion(params, **HYPER)
    run(optimizer, params, steps=2)
    before = snapshot(optimizer, params)
    with pytest.raises(LionError, match=r"not written by Lion.*momentum_init"):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same(before, snapshot(optimizer, params))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_can_step(duplicate):
    params = make_params()
    optimizer = Lion(params, **HYPER)
    run(optimizer, params, steps=1)
    twin = duplicate(optimizer)
    twin_params = twin.param_groups[0]["params"]
    run(twin, twin_params, steps=2)
    run(optimizer, params, steps=2)
    assert all(same_bits(a, b) for a, b in zip(params, twin_params, strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD_HYPERPARAMETERS = [
    ({"lr": -1e-4}, "lr .*-0.0001"),
    ({"lr": float("nan")}, "lr .*nan"),
    ({"lr": float("inf")}, "lr .*inf"),
    ({"weight_decay": -0.1}, "weight_decay .*-0.1"),
    ({"weight_decay": float("nan")}, "weight_decay .*nan"),
    ({"betas": (1.0, 0.99)}, "beta1 .*got 1"),
    ({"betas": (-0.1, 0.99)}, "beta1 .*-0.1"),
    ({"betas": (0.9, 1.5)}, "beta2 .*1.5"),
    ({"betas": (0.9, float("nan"))}, "beta2 .*nan"),
    ({"betas": (0.9,)}, r"betas .*\(0.9,\)"),
    ({"betas": (0.9, 0.95, 0.99)}, "betas .*0.95, 0.99"),
    ({"betas": 0.9}, "betas .*got 0.9"),
    ({"betas": ("a", "b")}, "beta1 .*'a'"),
    ({"momentum_init": "gradiant"}, "momentum_init 'gradiant' .*did you mean 'gradient'.*zero"),
    ({"momentum_init": None}, "momentum_init None .*gradient, zero"),
    ({"maximize": "false"}, "maximize must be True or False, got 'false'"),
    ({"lr": torch.tensor(-1.0)}, "lr must be a finite number >= 0, got -1.0"),
    ({"lr": torch.tensor(float("nan"))}, "lr .*nan"),
    ({"weight_decay": torch.tensor([1.0, 2.0])}, r"weight_decay .* with one element, got one of shape \(2,\)"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_HYPERPARAMETERS)
def test_a_bad_hyperparameter_is_named(bad, message):
    with pytest.raises(LionError, match=message):
        Lion(make_params(), **bad)
    with pytest.raises(LionError, match=message):
        Lion([{"params": make_params(), **bad}])


@pytest.mark.parametrize(("bad", "message"), BAD_HYPERPARAMETERS)
def test_a_group_with_a_bad_hyperparameter_is_not_added(bad, message):
    params = make_params()
    optimizer = Lion(params, **HYPER)
    with pytest.raises(LionError, match=message):
        optimizer.add_param_group({"params": make_params(), **bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bound", [{"lr": 0.0}, {"weight_decay": 0.0}, {"betas": (0.0, 0.0)}, {"betas": [0.9, 0.99]}])
def test_the_bounds_themselves_are_accepted(bound):
    params = make_params()
    run(Lion(params, **bound), params, steps=1)


def test_an_unknown_kernel_suggests_the_nearest():
    with pytest.raises(LionError, match=r"kernel 'forech' .*did you mean 'foreach'.*auto, foreach, fused, reference"):
        Lion(make_params(), kernel="forech")


def test_an_error_is_also_a_value_error():
    """As torch's own optimizers raise, for callers that do not know this package."""
    with pytest.raises(ValueError, match="lr"):
        Lion(make_params(), lr=-1.0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_parameters_that_are_not_real_floats_are_refused(dtype):
    """sign has no meaning for complex numbers, and an integer would drop every step smaller than one."""
    param = torch.zeros(2, 3, dtype=dtype)
    with pytest.raises(LionError, match=rf"{dtype}.*\(2, 3\)"):
        Lion([*make_params(), param])


def test_a_refused_parameter_group_is_not_added():
    optimizer = Lion(make_params())
    with pytest.raises(LionError, match="complex64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("quoted", [{"weight_decay": "0.1"}, {"betas": ("0.9", "0.95")}])
def test_a_number_in_quotes_is_refused_at_once(quoted):
    """YAML reads 1e-4 as text."""
    with pytest.raises(LionError, match="got '0"):
        Lion(make_params(), **quoted)


def test_a_group_begins_with_its_parameters_as_in_torch():
    """megatron-fsdp takes the parameters of a group from its first entry."""
    for optimizer_class in (torch.optim.AdamW, Lion):
        assert next(iter(optimizer_class(make_params()).param_groups[0])) == "params"


@pytest.mark.parametrize("value", [None, "fast", "1e-4"])
def test_a_learning_rate_that_is_not_a_number_is_named(value):
    with pytest.raises((TypeError, ValueError)) as caught:
        Lion(make_params(), lr=value)
    assert isinstance(caught.value, LionError)
    assert f"lr must be a finite number >= 0, got {value!r}" in str(caught.value)


def dense_and_sparse():
    dense, sparse = make_params(shapes=((4, 2), (4, 2)))
    dense.grad = torch.ones_like(dense)
    sparse.grad = torch.ones_like(sparse).to_sparse()
    return dense, sparse


def test_a_sparse_gradient_is_refused_and_changes_nothing():
    params = dense_and_sparse()
    optimizer = Lion(params, **HYPER)
    before = snapshot(optimizer, params)
    with pytest.raises(LionError, match=r"sparse gradients .*\(4, 2\).*sparse=False"):
        optimizer.step()
    assert_same(before, snapshot(optimizer, params))


def test_a_sparse_gradient_in_a_later_group_changes_nothing():
    """An update is applied whole or not at all."""
    params = dense_and_sparse()
    optimizer = Lion([{"params": [param]} for param in params], **HYPER)
    before = snapshot(optimizer, params)
    with pytest.raises(LionError, match="sparse gradients"):
        optimizer.step()
    assert_same(before, snapshot(optimizer, params))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_that_fails_in_a_later_group_changes_no_parameter(kernel):
    """An update is applied whole or not at all, and a retry after the repair is the step that failed."""
    params = make_params()
    optimizer = Lion([{"params": [param]} for param in params], kernel=kernel, **HYPER)
    expected = make_params()
    twin = Lion(expected, **HYPER)
    for param in (*params, *expected):
        param.grad = torch.ones_like(param)
    broken = optimizer.state[params[-1]] = {"exp_avg": torch.zeros(params[-1].shape, dtype=torch.int8)}
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        with pytest.raises(ValueError, match="exp_avgs must be floating-point"):
            optimizer.step()
        assert all(same_bits(a, b) for a, b in zip(before, params, strict=True))
    broken["exp_avg"] = torch.zeros_like(params[-1])
    optimizer.step()
    twin.step()
    assert all(same_bits(a, b) for a, b in zip(params, expected, strict=True))


def test_parameters_in_a_set_are_refused():
    """Sets have another order in each process, and state is saved by position."""
    for params in (set(make_params()), [{"params": set(make_params())}]):
        with pytest.raises(LionError, match="use a list, not a set"):
            Lion(params)


def test_a_parameter_that_the_fused_kernel_cannot_update_is_refused_at_the_start():
    with pytest.raises(LionError, match=r"fused kernel cannot be used: it supports fp32 and bf16.*float16"):
        Lion([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))], kernel="fused")


def test_a_checkpoint_does_not_bring_its_kernel():
    """Which kernel a machine has is not state: the saving machine may have had a compiler that this one lacks."""
    params = make_params()
    saved = Lion(params, kernel="fused").state_dict()
    optimizer = Lion(params, kernel="reference")
    optimizer.load_state_dict(saved)
    assert [group["kernel"] for group in optimizer.param_groups] == ["reference"]
