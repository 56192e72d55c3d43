"""Settings of Lion's precision, with Megatron's own: what they resolve to, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lion.config import LionError, LionOptions

storage = pytest.importorskip("megatron_lion.integration.flags.state_precision")

DEFAULTS = {
    "use_precision_aware_optimizer": False,
    "optimizer_cpu_offload": False,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "main_params_dtype": "fp32",
    "main_grads_dtype": "fp32",
    "grad_reduce_in_bf16": False,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "lion_momentum_dtype": None,
    "lion_master_weights": None,
    "bf16": True,
    "fp16": False,
    "use_distributed_optimizer": True,
    "lion_beta1": None,
    "lion_beta2": None,
    "lion_kernel": "auto",
    "lion_gather": "params",
    "lion_gather_refresh": 0,
    "lion_reduce": "stock",
    "lion_error_feedback": "int8",
    "lion_fast_norm": False,
    "lion_init_from": None,
    "lion_rates_from_run": False,
    "lion_saves_stacks": False,
}


def resolved(**given: Any) -> tuple[str, str]:
    args = SimpleNamespace(**{**DEFAULTS, **given})
    options = LionOptions.from_config(args)
    storage.check(args, options)
    options.write_to(args)
    assert LionOptions.from_config(args) == options, "reading what was written gives other options"
    return options.momentum_dtype, options.master_weights


@pytest.mark.parametrize(
    ("given", "momentum", "master"),
    [
        ({}, "fp32", "fp32"),
        ({"lion_momentum_dtype": "int8"}, "int8", "fp32"),
        ({"lion_master_weights": "remainder"}, "fp32", "remainder"),
        ({"exp_avg_dtype": "bf16"}, "fp32", "fp32"),  # Megatron uses it in the precision-aware optimizer alone
        ({"use_precision_aware_optimizer": True}, "fp32", "remainder"),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"}, "bf16", "remainder"),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}, "bf16", "remainder"),
        ({"use_precision_aware_optimizer": True, "bf16": False}, "fp32", "fp32"),
        ({"use_precision_aware_optimizer": True, "lion_master_weights": "fp32"}, "fp32", "fp32"),
        ({"use_precision_aware_optimizer": True, "lion_momentum_dtype": "int8"}, "int8", "remainder"),
        ({"fp8_param_gather": True}, "fp32", "fp32"),  # Megatron keeps the masters and writes the weights
    ],
)
def test_flags_are_settled(given: dict[str, Any], momentum: str, master: str) -> None:
    assert resolved(**given) == (momentum, master)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "fp8"}, "--exp-avg-dtype fp8.*fp32 or bf16.*int8"),
        ({"exp_avg_sq_dtype": "bf16"}, "--exp-avg-sq-dtype bf16: Lion has no second moment"),
        ({"main_params_dtype": "fp16"}, "--main-params-dtype fp16.*--lion-master-weights remainder"),
        (
            {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "lion_momentum_dtype": "int8"},
            "--lion-momentum-dtype int8 contradicts --exp-avg-dtype bf16",
        ),
        ({"lion_momentum_dtype": "bf16", "use_distributed_optimizer": False}, "bf16 needs --use-distributed-optimizer"),
        ({"main_grads_dtype": "bf16", "use_distributed_optimizer": False}, "--main-grads-dtype bf16 needs"),
        ({"fp8_param_gather": True, "lion_momentum_dtype": "bf16"}, "--fp8-param-gather is not supported"),
        ({"fp4_param_gather": True, "lion_master_weights": "remainder"}, "--fp4-param-gather is not supported"),
        ({"fp8_param_gather": True, "grad_reduce_in_bf16": True}, "accumulate-allreduce-grads-in-fp32"),
        ({"fp4_param_gather": True, "main_grads_dtype": "bf16"}, "accumulate-allreduce-grads-in-fp32"),
        ({"fp8_param_gather": True, "optimizer_cpu_offload": True}, "--fp8-param-gather is not supported"),
        ({"lion_master_weights": "remainder", "bf16": False}, "no bf16 parameters. Add --bf16"),
        ({"optimizer_cpu_offload": True, "lion_momentum_dtype": "int8"}, "not supported with --optimizer-cpu-offload"),
        ({"optimizer_cpu_offload": True, "bf16": False}, "--optimizer-cpu-offload is not supported in fp32"),
    ],
)
def test_unsupported_settings_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LionError, match=said):
        resolved(**given)


def chunk(*, fp32_gradients: bool = True, **settings: bool) -> SimpleNamespace:
    """A model chunk as the factory is given it, without parameters."""
    names = {"fp8_param": False, "fp4_param": False, "fp8_param_gather": False, "fp4_param_gather": False, **settings}
    ddp_config = SimpleNamespace(grad_reduce_in_fp32=fp32_gradients, **names)
    return SimpleNamespace(ddp_config=ddp_config, config=SimpleNamespace(**names), named_parameters=lambda: [])


def path_for(*chunks: SimpleNamespace, offload: bool = False, **stored: str) -> tuple[bool, bool]:
    """Whether the precision-aware path is taken, and Megatron's own field for it."""
    config = SimpleNamespace(bf16=True, use_distributed_optimizer=True, optimizer_cpu_offload=offload)
    taken = storage.use_precision_aware_path(config, LionOptions(**stored), list(chunks))
    return taken, config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


QUANTIZED = ["fp8_param", "fp4_param", "fp8_param_gather", "fp4_param_gather"]


@pytest.mark.parametrize("setting", QUANTIZED)
@pytest.mark.parametrize(
    "reason",
    [{"momentum_dtype": "bf16"}, {"master_weights": "remainder"}, {"offload": True}, {"fp32_gradients": False}],
    ids=str,
)
def test_fp8_and_fp4_weights_are_refused_where_lion_would_write_them(setting: str, reason: dict[str, Any]) -> None:
    fp32_gradients = reason.get("fp32_gradients", True)
    stored = {name: value for name, value in reason.items() if name != "fp32_gradients"}
    plain = chunk(fp32_gradients=fp32_gradients)
    assert path_for(plain, **stored) == (True, True)
    with pytest.raises(LionError, match=f"{setting}=True is not supported where Lion writes"):
        path_for(plain, chunk(fp32_gradients=fp32_gradients, **{setting: True}), **stored)


@pytest.mark.parametrize("setting", QUANTIZED)
def test_fp8_and_fp4_weights_are_left_to_megatron_where_it_writes_them(setting: str) -> None:
    assert path_for(chunk(**{setting: True})) == (False, False)


def test_a_weight_that_is_quantized_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.compat, "is_quantized", lambda param: True)
    with_weight = chunk()
    with_weight.named_parameters = lambda: [("layers.0.weight", torch.nn.Parameter(torch.ones(1)))]
    with pytest.raises(LionError, match=r"the Parameter layers\.0\.weight is not supported"):
        path_for(with_weight, momentum_dtype="int8")
