"""What the flags of Lion's precision come to, alone and with Megatron's own, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lion.config import LionError

storage = pytest.importorskip("megatron_lion.integration.flags.state_precision")

DEFAULTS = {
    "use_precision_aware_optimizer": False,
    "optimizer_cpu_offload": False,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "main_params_dtype": "fp32",
    "main_grads_dtype": "fp32",
    "lion_momentum_dtype": None,
    "lion_master_weights": None,
    "bf16": True,
    "use_distributed_optimizer": True,
}


def resolved(**given: Any) -> tuple[str, str]:
    args = SimpleNamespace(**{**DEFAULTS, **given})
    storage.resolve(args)
    return args.lion_momentum_dtype, args.lion_master_weights


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
        ({"lion_master_weights": "remainder", "bf16": False}, "no bf16 parameters: add --bf16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LionError, match=said):
        resolved(**given)
