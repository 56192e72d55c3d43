"""Hooks of ``Lion.load_state_dict`` see and change the state itself, as with torch's own optimizers."""

import pytest
import torch

from megatron_lion.lion import Lion
from tests.test_lion import HYPER, make_params, run, same_bits

# Each makes an optimizer that has stepped twice; one Lion stores its state in a dtype that torch would cast.
HOOKED = {
    "lion": lambda params: Lion(params, **HYPER),
    "lion-int8": lambda params: Lion(params, **HYPER, momentum_dtype="int8"),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}
every_hooked = pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED.keys())


def stepped(make):
    params = make_params()
    optimizer = make(params)
    run(optimizer, params, steps=2)
    return optimizer, params


@every_hooked
def test_a_load_pre_hook_sees_and_changes_the_state_that_is_loaded(make):
    """torch's own optimizers are in the list: what holds for them holds for Lion."""
    saved = stepped(make)[0].state_dict()
    optimizer, params = stepped(make)
    seen = []

    def clear_first(_, state_dict):
        seen.append({number: set(state) for number, state in state_dict["state"].items()})
        first = {key: torch.zeros_like(value) for key, value in state_dict["state"][0].items()}
        return {**state_dict, "state": {**state_dict["state"], 0: first}}

    optimizer.register_load_state_dict_pre_hook(clear_first)
    optimizer.load_state_dict(saved)
    assert seen == [{number: set(state) for number, state in saved["state"].items()}]
    assert not any(value.any() for value in optimizer.state[params[0]].values())
    assert all(tensor.any() for param in params[1:] for tensor in optimizer.state[param].values())


@every_hooked
def test_what_a_load_post_hook_changes_stays(make):
    saved = stepped(make)[0].state_dict()
    optimizer, params = stepped(make)
    seen = []

    def clear_first(optimizer):
        seen.append({param: {key: value.clone() for key, value in optimizer.state[param].items()} for param in params})
        optimizer.state[params[0]] = {key: torch.zeros_like(v) for key, v in optimizer.state[params[0]].items()}
        optimizer.param_groups[0].update(lr=0.7, kernel="reference")

    optimizer.register_load_state_dict_post_hook(clear_first)
    optimizer.load_state_dict(saved)
    for number, param in enumerate(params):
        assert seen[0][param].keys() == saved["state"][number].keys()
        assert all(same_bits(seen[0][param][key], value) for key, value in saved["state"][number].items())
    assert not any(value.any() for value in optimizer.state[params[0]].values())
    assert [optimizer.param_groups[0][key] for key in ("lr", "kernel")] == [0.7, "reference"]


def test_a_load_pre_hook_may_make_another_optimizers_state_lions():
    adam, _ = stepped(HOOKED["adamw"])
    optimizer, params = stepped(HOOKED["lion"])

    def from_adam(optimizer, state_dict):
        groups = [{**group, **optimizer.defaults} for group in state_dict["param_groups"]]
        state = {number: {"exp_avg": state["exp_avg"]} for number, state in state_dict["state"].items()}
        return {"state": state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(from_adam)
    optimizer.load_state_dict(adam.state_dict())
    for param, state in zip(params, adam.state.values(), strict=True):
        assert same_bits(optimizer.state[param]["exp_avg"], state["exp_avg"])


def test_hooks_of_a_load_are_those_that_the_caller_registered():
    """Also after a load that was refused: no hook of Lion's own stays."""
    optimizer, _ = stepped(HOOKED["lion"])
    saved = optimizer.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
        optimizer.load_state_dict(saved)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
