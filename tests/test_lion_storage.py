"""Lion's state in other precisions: steps, saving, loading and converting, against fp32 kept by hand."""

import copy

import pytest
import torch

from megatron_lion import kernels
from megatron_lion.config import LionError
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion
from megatron_lion.precision import BlockLayout, dequantize, join_master, quantize, split_master
from megatron_lion.step import LionUpdate, StepKind
from megatron_lion.storage import Storage
from megatron_lion.update import lion_step, lion_update_

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
STORAGES = [(momentum, master) for momentum in (None, "fp32", "bf16", "int8") for master in (None, "fp32", "remainder")]
SHAPES = ((3, 70), (64,), ())


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def train(optimizer: ShardedLion, params: list[torch.nn.Parameter], steps: int, seed: int = 1) -> None:
    """Steps along gradients that depend on the parameters, so that every bit of them matters."""
    torch.manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = (param.detach().float() - torch.randn(param.shape)).to(param.dtype)
        optimizer.step()


def values(optimizer: ShardedLion, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [optimizer.get_unscaled_state(p, name).clone() for p in params for name in ("exp_avg", "master_param")]


def assert_equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("momentum", "master"), STORAGES)
def test_the_kind_of_a_storage_is_that_of_its_steps(
    momentum: str | None, master: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known at the start, before there are gradients or state."""
    params, kinds = parameters(dtype), []

    def recorded(kernel: str, kind: StepKind, *, digits: bool) -> LionUpdate:
        kinds.append(kind)
        return lion_update_

    monkeypatch.setattr(kernels, "choose", recorded)
    optimizer = ShardedLion(params, **HYPER, momentum_dtype=momentum, master_weights=master)
    expected = {Storage(momentum, master).kind(param, param.dtype) for param in params}
    train(optimizer, params, 1)
    assert set(kinds) == expected


@pytest.mark.parametrize(("momentum", "master"), STORAGES)
def test_each_storage_follows_the_rule_with_its_own_rounding(momentum: str | None, master: str | None) -> None:
    params = parameters()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype=momentum, master_weights=master)
    thetas = [param.detach().float() for param in params]
    momenta = [torch.zeros_like(theta) for theta in thetas]
    torch.manual_seed(1)
    for _ in range(20):
        for index, param in enumerate(params):
            param.grad = (param.detach().float() - torch.randn(param.shape)).bfloat16()
            theta, m = lion_step(
                thetas[index], param.grad, momenta[index], lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1
            )
            layout = BlockLayout.of_whole(m)
            thetas[index] = theta.bfloat16().float() if master is None else theta
            rounded = {"fp32": m, "int8": dequantize(*quantize(m, layout), layout)}
            momenta[index] = rounded.get(momentum or "bf16", m.bfloat16().float())
        optimizer.step()
        for param, theta, m in zip(params, thetas, momenta, strict=True):
            assert torch.equal(optimizer.get_unscaled_state(param, "exp_avg"), m)
            assert torch.equal(optimizer.get_unscaled_state(param, "master_param"), theta)
            shown = split_master(theta)[0] if master == "remainder" else theta.bfloat16()
            assert torch.equal(param, shown)


@pytest.mark.parametrize(("momentum", "master"), STORAGES)
def test_state_takes_the_stated_bytes(momentum: str | None, master: str | None) -> None:
    param = torch.nn.Parameter(torch.zeros(128, 64, dtype=torch.bfloat16))
    optimizer = ShardedLion([param], momentum_dtype=momentum, master_weights=master)
    optimizer.init_state()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.state[param].values())
    per_element = {None: 2, "fp32": 4, "bf16": 2, "int8": 1 + 2 / 32}[momentum]
    per_element += {None: 0, "fp32": 4, "remainder": 2}[master]
    assert stored == per_element * param.numel()


@pytest.mark.parametrize(("momentum", "master"), STORAGES)
def test_a_loaded_optimizer_continues_bit_for_bit(momentum: str | None, master: str | None) -> None:
    params = parameters()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype=momentum, master_weights=master)
    train(optimizer, params, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = ShardedLion(loaded_params, **HYPER, momentum_dtype=momentum, master_weights=master)
    loaded.load_state_dict(saved)
    train(optimizer, params, 5, seed=2)
    train(loaded, loaded_params, 5, seed=2)
    assert_equal(values(loaded, loaded_params), values(optimizer, params))
    for one, two in zip(loaded.state.values(), optimizer.state.values(), strict=True):
        assert {key: tensor.dtype for key, tensor in one.items()} == {key: tensor.dtype for key, tensor in two.items()}


@pytest.mark.parametrize("saved", [("fp32", "fp32"), ("bf16", "remainder"), ("int8", "remainder"), ("int8", "fp32")])
@pytest.mark.parametrize("wanted", [("fp32", "fp32"), ("bf16", "remainder"), ("int8", "remainder"), ("bf16", "fp32")])
def test_another_storage_takes_over_the_values(saved: tuple[str, str], wanted: tuple[str, str]) -> None:
    params = parameters()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype=saved[0], master_weights=saved[1])
    train(optimizer, params, 5)
    loaded_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = ShardedLion(loaded_params, **HYPER, momentum_dtype=wanted[0], master_weights=wanted[1])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, before in zip(loaded_params, params, strict=True):
        assert torch.equal(
            loaded.get_unscaled_state(param, "master_param"), optimizer.get_unscaled_state(before, "master_param")
        )
        momentum = optimizer.get_unscaled_state(before, "exp_avg")
        expected = momentum.bfloat16().float() if wanted[0] == "bf16" else momentum
        assert torch.equal(loaded.get_unscaled_state(param, "exp_avg"), expected), "int8 waits for the first step"
    train(loaded, loaded_params, 1)
    for state in loaded.state.values():
        assert (
            str(state["exp_avg"].dtype)
            == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "int8": "torch.int8"}[wanted[0]]
        )
        assert ("exp_avg_scale" in state) == (wanted[0] == "int8")


def test_a_momentum_cut_into_other_blocks_is_exact_until_its_first_step() -> None:
    param = torch.nn.Parameter(torch.zeros(96))
    optimizer = ShardedLion([param], **HYPER, momentum_dtype="int8")
    optimizer.init_state()
    torch.manual_seed(4)
    shifted = dequantize(*quantize(torch.randn(112), BlockLayout(0, 112)), BlockLayout(0, 112))[16:]
    optimizer.set_scaled_state(param, "exp_avg", shifted)
    assert torch.equal(optimizer.get_unscaled_state(param, "exp_avg"), shifted)
    param.grad = torch.randn(96)
    theta, m = lion_step(param.detach(), param.grad, shifted, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(param, theta)
    assert torch.equal(
        optimizer.get_unscaled_state(param, "exp_avg"), dequantize(*quantize(m, BlockLayout(0, 96)), BlockLayout(0, 96))
    )
    assert optimizer.state[param]["exp_avg"].dtype == torch.int8


def test_blocks_of_a_shard_are_those_of_its_parameter() -> None:
    torch.manual_seed(5)
    whole, grad = torch.randn(4, 100), torch.randn(4, 100)
    runs = []
    for pieces in ([(0, 400)], [(0, 264), (264, 400)]):  # 264 = 2 * 100 + 64
        params = [torch.nn.Parameter(whole.flatten()[start:stop].clone()) for start, stop in pieces]
        optimizer = ShardedLion(params, **HYPER, momentum_dtype="int8")
        optimizer.blocks = {param: BlockLayout(start, 100) for param, (start, _) in zip(params, pieces, strict=True)}
        for _ in range(3):
            for param, (start, stop) in zip(params, pieces, strict=True):
                param.grad = grad.flatten()[start:stop] * (1 + param.detach())
            optimizer.step()
        runs.append([torch.cat(list(params)), torch.cat([optimizer.get_unscaled_state(p, "exp_avg") for p in params])])
    assert_equal(runs[0], runs[1])


def test_decoupled_gradients_may_have_another_dtype() -> None:
    params = parameters()
    one = ShardedLion(params, **HYPER, momentum_dtype="bf16", master_weights="remainder")
    one.use_decoupled_grad = True
    torch.manual_seed(1)
    for param in params:
        param.decoupled_grad = torch.randn(param.shape)
    before = [param.detach().clone() for param in params]
    one.step()
    for param, start in zip(params, before, strict=True):
        theta, _ = lion_step(
            start.float(),
            param.decoupled_grad,
            torch.zeros(param.shape),
            lr=1e-3,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
        )
        assert torch.equal(join_master(param, one.state[param]["master_param"]), theta)


def test_momentum_that_begins_with_the_gradient_is_stored_as_asked() -> None:
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = ShardedLion([param], **HYPER, momentum_init="gradient", momentum_dtype="int8")
    param.grad = torch.randn(64)
    optimizer.step()
    layout = BlockLayout(0, 64)
    start = dequantize(*quantize(param.grad, layout), layout)
    _, m = lion_step(torch.zeros(64), param.grad, start, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert torch.equal(optimizer.get_unscaled_state(param, "exp_avg"), dequantize(*quantize(m, layout), layout))


def test_fp32_parameters_are_their_own_masters() -> None:
    params = parameters(torch.float32)
    optimizer = ShardedLion(params, **HYPER, master_weights="remainder")
    train(optimizer, params, 1)
    assert all("master_param" not in state for state in optimizer.state.values())
    optimizer.set_scaled_state(params[0], "master_param", torch.ones(3, 70))
    assert torch.equal(params[0], torch.ones(3, 70))


def test_what_cannot_be_stored_is_refused() -> None:
    half = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))]
    with pytest.raises(LionError, match=r"float16.*shape \(3,\).*master_weights='fp32'"):
        ShardedLion(half, master_weights="remainder")
    with pytest.raises(LionError, match="momentum_dtype 'in8' is unknown: did you mean 'int8'"):
        ShardedLion(parameters(), momentum_dtype="in8")
    params = parameters()
    optimizer = ShardedLion(params, master_weights="remainder")
    optimizer.init_state()
    with pytest.raises(LionError, match="has master weights, which would be lost"):
        ShardedLion(params).load_state_dict(optimizer.state_dict())
    with pytest.raises(LionError, match="state 'exp_avg_sq' is unknown"):
        optimizer.get_unscaled_state(params[0], "exp_avg_sq")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_scale", "master_param"])
def test_state_of_another_shape_is_refused_by_name(key: str) -> None:
    """Also with as many elements: the fused kernel would train on it, in another order."""
    params = parameters()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype="int8", master_weights="fp32")
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["state"] = {number: dict(state) for number, state in saved["state"].items()}
    saved["state"][0][key] = saved["state"][0][key].reshape(1, -1)
    with pytest.raises(LionError, match=rf"saved {key} of a parameter of shape \(3, 70\) has shape \(1, "):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("remainder", "fp32"), ("fp32", "remainder"), (None, "fp32")])
def test_masters_in_another_format_are_the_saved_ones_if_the_model_is_loaded_first(
    saved_as: str | None, loaded_as: str
) -> None:
    theirs, params = parameters(), [torch.nn.Parameter(torch.zeros_like(param)) for param in parameters()]
    saving = ShardedLion(theirs, **HYPER, master_weights=saved_as)
    train(saving, theirs, 3)
    loading = ShardedLion(params, **HYPER, master_weights=loaded_as)
    with torch.no_grad():
        for param, other in zip(params, theirs, strict=True):
            param.copy_(other)
    loading.load_state_dict(saving.state_dict())
    for param, other in zip(params, theirs, strict=True):
        assert torch.equal(
            loading.get_unscaled_state(param, "master_param"), saving.get_unscaled_state(other, "master_param")
        )


def more_groups(saved: dict) -> dict:
    return {**saved, "param_groups": saved["param_groups"] * 2}


def fewer_parameters(saved: dict) -> dict:
    (group,) = saved["param_groups"]
    return {**saved, "param_groups": [{**group, "params": group["params"][:-1]}]}


def a_foreign_group(saved: dict) -> dict:
    return {**saved, "param_groups": [*saved["param_groups"], {"params": [], "lr": 1.0}]}


def a_foreign_state(saved: dict) -> dict:
    return {**saved, "state": {**saved["state"], len(SHAPES) - 1: {"momentum_buffer": torch.ones(())}}}


def a_transposed_state(saved: dict) -> dict:
    return {**saved, "state": {**saved["state"], 0: {key: value.t() for key, value in saved["state"][0].items()}}}


@pytest.mark.parametrize("spoil", [more_groups, fewer_parameters, a_foreign_group, a_foreign_state, a_transposed_state])
@pytest.mark.parametrize(("momentum", "master"), [("int8", "remainder"), ("fp32", "fp32"), (None, None)])
def test_a_refused_load_changes_nothing(spoil, momentum: str | None, master: str | None) -> None:
    """Of a state in another storage: with remainders the bf16 parameter is a half of what is loaded."""
    theirs = [torch.nn.Parameter(-param.detach()) for param in parameters()]
    saving = ShardedLion(theirs, **HYPER, momentum_dtype="fp32", master_weights=master and "fp32")
    train(saving, theirs, 3)
    params = parameters()
    optimizer = ShardedLion(params, **HYPER, momentum_dtype=momentum, master_weights=master)
    train(optimizer, params, 1)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    before = [param.detach().clone() for param in params] + values(optimizer, params)
    with pytest.raises(ValueError, match=r"parameter group|not written by Lion|no exp_avg|another model's"):
        optimizer.load_state_dict(spoil(saving.state_dict()))
    assert_equal([param.detach() for param in params] + values(optimizer, params), before)
    assert [{key: group[key] for key in groups[0]} for group in optimizer.param_groups] == groups
