"""Runs of Megatron-FSDP, and one checkpoint for two ways to shard: ``fully_reshardable`` as ``fsdp_dtensor``."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.harness import HORIZON, NO_DROPOUT, pretrain_flags, read_checkpoint, run_ranks
from tests.versions import since

FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"
RUN = f"--optimizer lion {HORIZON} {NO_DROPOUT} --make-vocab-size-divisible-by 256"
NO_SHARD = pytest.param("no_shard", marks=since("0.18"))  # 0.17 fails in the first step, with any optimizer
# The distributed optimizer reduces fp32 gradients, FSDP those of bf16 weights in bf16 unless told so.
FP32_GRADIENTS = "--megatron-fsdp-main-grads-dtype fp32 --megatron-fsdp-grad-comm-dtype fp32"
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type allgather --disable-bias-linear --expert-model-parallel-size 2"
)
# The norms' names in a torch_dist checkpoint of Megatron's local layers.
NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def saving(folder: Path, interval: int) -> str:
    return f"--save {folder} --save-interval {interval}"


def tensors_of(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and momenta; other tensors are of the random generators."""
    return {key: tensor for key, tensor in checkpoint.items() if key.startswith(("model.", "optimizer.state."))}


def pretrain_or_fail(text: Path, *flags: str, ranks: int) -> str:
    """The output of a run that must fail."""
    failed = run_ranks(*pretrain_flags(text), *flags, ranks=ranks)
    assert failed.returncode != 0
    return failed.output


def put_state_of(distributed: Path, fsdp: Path, iteration: int, target: Path) -> None:
    """Write the ``fsdp_dtensor`` checkpoint in ``fsdp`` to ``target``, with the masters and momenta of ``distributed``.

    Both were saved at ``iteration`` by runs of one model. Every weight and every momentum is replaced.
    """
    source = read_checkpoint(distributed, iteration)
    folder = f"iter_{iteration:07d}"
    state: dict[str, Any] = {}
    reader = FileSystemReader(fsdp / folder)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    masters = {key: _of(source, "param", key) for key in state["model"]}
    for name, value in masters.items():
        assert value.shape == state["model"][name].shape
    momenta = {key: {"exp_avg": _of(source, "exp_avg", key)} for key in state["optimizer"]["state"]}
    changed = {**state, "model": masters, "optimizer": {**state["optimizer"], "state": momenta}}
    save(changed, storage_writer=FileSystemWriter(target / folder), no_dist=True)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def _of(source: dict[str, torch.Tensor], kind: str, key: str) -> torch.Tensor:
    name = re.sub(r"^(module\.)+", "", key)
    for local, fused in NAMES.items():
        name = name.replace(local, fused)
    name, half = (name[:-2], name[-1]) if name.endswith(("_w", "_v")) else (name, None)
    layer = re.search(r"\.layers\.(\d+)\.", name)
    tensor = source[f"optimizer.state.{kind}.{re.sub(r'layers[.][0-9]+', 'layers', name)}"]
    tensor = tensor[int(layer[1])] if layer else tensor
    return tensor.chunk(2)["wv".index(half)] if half else tensor
