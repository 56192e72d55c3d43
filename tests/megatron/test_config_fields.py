"""Lion's options are fields of Megatron's own OptimizerConfig: every way to make or copy one carries them."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_lion.integration.compat.versions import minor_version

# Evaluates expressions with a registered Megatron; answers each with its value, or with the error.
PROBE = """
import argparse, copy, dataclasses, json, pickle, sys
import torch
{before}
import megatron_lion

megatron_lion.register()
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from megatron_lion.config import LionOptions

BF16 = dict(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
AWARE = dict(use_precision_aware_optimizer=True, main_grads_dtype=torch.bfloat16, exp_avg_dtype=torch.bfloat16,
             exp_avg_sq_dtype=torch.bfloat16)
FP32_AWARE = dict(use_precision_aware_optimizer=True)


def lion(**given):
    return OptimizerConfig(optimizer="lion", lr=1e-4, **given)


def betas(config):
    return [config.lion_beta1, config.lion_beta2]


def stored(config):
    options = LionOptions.from_config(config)
    return [options.momentum_dtype, options.master_weights]


def from_arguments(**given):  # as several frameworks make it from Megatron's command line
    args = argparse.Namespace(optimizer="lion", lr=1e-4, **given)
    copied = {{f.name: getattr(args, f.name) for f in dataclasses.fields(OptimizerConfig) if hasattr(args, f.name)}}
    return OptimizerConfig(**copied)


@dataclasses.dataclass
class Deferred(OptimizerConfig):  # as Megatron-Bridge has it
    def __post_init__(self):
        pass

    def finalize(self):
        super().__post_init__()
        return self


def chunk(weight=None, **ddp_settings):
    model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    if weight is not None:
        model.weight = torch.nn.Parameter(weight)
    model.ddp_config = DistributedDataParallelConfig(**ddp_settings)
    return model


def dtensor():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)))


def mimo():
    from megatron.core.models.mimo.model.base import MimoModel

    return MimoModel.__new__(MimoModel)


def mimo_directly(config):
    from megatron.core.models.mimo import optimizer

    class OneRank:
        def is_current_rank_in_grid(self):
            return True

    optimizer._get_pg_collection_for_optimizer = lambda grid: None
    described = argparse.Namespace(module_to_grid_map={{optimizer_key(): OneRank()}})
    return optimizer.get_mimo_optimizer(argparse.Namespace(mimo_config=described, language_model=chunk()), config)


def optimizer_key():
    from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY

    return MIMO_LANGUAGE_MODULE_KEY


def build(config, *chunks):
    return get_megatron_optimizer(config, list(chunks) or [chunk()])


def outcome(expression):
    try:
        return eval(expression)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"


print("OUTCOMES", json.dumps({{line: outcome(line) for line in json.load(sys.stdin)}}))
"""

OURS = [0.9, 0.95]
MEGATRONS = [0.95, 0.98] if minor_version() >= "0.17" else [None, None]  # it has no such fields before
BF16_REMAINDER = ["bf16", "remainder"]
EXPECTED: dict[str, Any] = {
    # betas
    "betas(lion())": OURS,
    "betas(lion(lion_beta1=0.8))": [0.8, 0.95],
    "betas(lion(lion_beta2=0.98))": [0.9, 0.98],
    "betas(from_arguments())": OURS,
    "betas(from_arguments(lion_beta1=None, lion_beta2=None))": OURS,
    "betas(dataclasses.replace(lion(lion_beta1=0.8), lr=1e-5))": [0.8, 0.95],
    "betas(Deferred(optimizer='lion').finalize())": OURS,
    "LionOptions.from_config(Deferred(optimizer='lion')).betas": OURS,
    "betas(OptimizerConfig())": MEGATRONS,
    "betas(OptimizerConfig(optimizer='muon'))": MEGATRONS,
    "betas(OptimizerConfig(optimizer='muon', lion_beta1=0.7))": [0.7, MEGATRONS[1]],
    # each way to make or to copy a configuration
    "lion(lion_kernel='fused').lion_kernel": "fused",
    "dataclasses.replace(lion(lion_kernel='fused'), lr=1e-5).lion_kernel": "fused",
    "dataclasses.asdict(lion(lion_kernel='fused'))['lion_kernel']": "fused",
    "copy.deepcopy(lion(lion_kernel='fused')).lion_kernel": "fused",
    "pickle.loads(pickle.dumps(lion(lion_kernel='fused'))).lion_kernel": "fused",
    "from_arguments(lion_kernel='fused', lion_init_from='adam').lion_init_from": "adam",
    "Deferred(lion_kernel='fused').lion_kernel": "fused",
    "AdamOptimizerConfig(lion_kernel='fused').lion_kernel": "fused",
    "lion(lion_kernel='fused') == lion(lion_kernel='fused') != lion(lion_kernel='foreach')": True,
    "'lion_kernel=' in repr(lion())": True,
    # what is wrong
    "lion(lion_momentum_dtyp='bf16')": "TypeError: OptimizerConfig.__init__() got an unexpected keyword argument "
    "'lion_momentum_dtyp'",
    "stored(lion(lion_momentum_dtype='fp23', **BF16))": "LionError: --lion-momentum-dtype 'fp23' is unknown: did you "
    "mean 'fp32'? Valid: bf16, fp32, int8",
    "stored(lion(lion_momentum_dtype='bf16'))": "LionError: --lion-momentum-dtype bf16 needs "
    "--use-distributed-optimizer (also on one rank): add it",
    "OptimizerConfig(optimizer='sgd', **AWARE)": "AssertionError: --use-precision-aware-optimizer only supported with "
    "adam",
    # precision, also as verl and Megatron-Bridge ask for it
    "stored(lion())": ["fp32", "fp32"],
    "stored(lion(lion_momentum_dtype='int8', **BF16))": ["int8", "fp32"],
    "stored(lion(**BF16, **AWARE))": BF16_REMAINDER,
    "stored(dataclasses.replace(lion(**BF16, **AWARE), lr=1e-5))": BF16_REMAINDER,
    "stored(lion(store_param_remainders=False, **BF16, **AWARE))": ["bf16", "fp32"],
    "stored(from_arguments(**BF16, **AWARE))": BF16_REMAINDER,
    "stored(Deferred(optimizer='lion', **BF16, **AWARE).finalize())": BF16_REMAINDER,
    "stored(lion(lion_momentum_dtype='int8', lion_master_weights='fp32', **BF16, **FP32_AWARE))": ["int8", "fp32"],
}


# A configuration that was made before the registration.
OLDER = """
from megatron.core.optimizer import OptimizerConfig
made = OptimizerConfig(optimizer="lion", lr=1e-4)
older = lambda: made
"""
NOT_SUPPORTED = "is not supported with --optimizer lion: "
# What is refused where the optimizer is built, with the beginning of the message.
REFUSED = {
    "build(lion(optimizer_cuda_graph=True))": f"--optimizer-cuda-graph {NOT_SUPPORTED}a captured step would reuse",
    "build(lion(), chunk(dtensor()))": f"--use-torch-fsdp2 {NOT_SUPPORTED}Megatron cannot resume its checkpoints",
    "build(lion(), mimo())": f"MimoModel {NOT_SUPPORTED}Megatron builds an optimizer for each of its modules",
    "build(lion(lion_momentum_dtype='bf16', **BF16), chunk(fp8_param_gather=True))": "fp8_param_gather=True is not "
    "supported where Lion writes the 16-bit parameters itself",
    "build(lion(**BF16, **AWARE), chunk(fp4_param_gather=True))": "fp4_param_gather=True is not supported where Lion",
    "build(lion(decoupled_weight_decay=False))": "--optimizer lion needs decoupled_weight_decay=True",
    "build(dataclasses.replace(lion(), lr=None))": "--optimizer lion needs --lr",
    "build(lion(min_lr=1e-3))": "--min-lr 0.001 is greater than --lr 0.0001",
    "build(lion(lion_kernel='fusd'))": "--lion-kernel 'fusd' is unknown: did you mean 'fused'",
    "build(older())": "this OptimizerConfig was made before megatron_lion.register()",
}
if minor_version() >= "0.17":
    REFUSED["build(lion(fp16=True), chunk(use_megatron_fsdp=True))"] = (
        "--fp16 is not supported with --optimizer lion and --use-megatron-fsdp: its gradients have no loss scale"
    )
if minor_version() >= "0.17":  # before, Megatron has no optimizer for it
    REFUSED["mimo_directly(lion())"] = f"MimoModel {NOT_SUPPORTED}Megatron builds an optimizer for each of its modules"


def probe(lines: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Evaluate ``lines`` in a process that runs ``before`` ahead of the registration."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE.format(before=before)],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "MEGATRON_LION_DEVICE": "cuda"},
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    result = probe([*EXPECTED, *REFUSED], before=OLDER)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.split("OUTCOMES ")[-1])
    return found


@pytest.mark.supports("`megatron.core` / options", "each way to make a configuration")
@pytest.mark.parametrize("line", EXPECTED)
def test_the_options_are_fields_of_megatrons_configuration(outcomes: dict[str, Any], line: str) -> None:
    assert outcomes[line] == EXPECTED[line]


@pytest.mark.refuses("`megatron.core` / refusals")
@pytest.mark.parametrize("line", REFUSED)
def test_what_lion_does_not_support_is_refused_where_it_is_built(outcomes: dict[str, Any], line: str) -> None:
    assert outcomes[line].startswith(f"LionError: {REFUSED[line]}"), outcomes[line]


def test_a_subclass_that_is_older_than_the_fields_is_named() -> None:
    result = probe(
        [],
        before="from megatron.core.optimizer import OptimizerConfig\n"
        "@dataclasses.dataclass\nclass Earlier(OptimizerConfig):\n    mine: int = 0\n"
        "class Plain(OptimizerConfig):\n    pass  # has the constructor of the class above, so it takes the options",
    )
    assert (
        "LionError: __main__.Earlier: subclass of Megatron's OptimizerConfig that was defined before" in result.stderr
    )
    assert "Call megatron_lion.register() before you import that module" in result.stderr
