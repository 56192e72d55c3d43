"""Run under torchrun in the place of a pretraining script: train, and at each round look into what it counts.

    torchrun tests/megatron/probe_round.py <Megatron's flags>

Each round's place is taken by one that leaves, as ``rank<N>.json`` in the folder PROBE_OUTPUT:

- ``record``: what the package's own round measured;
- ``counted``: l1, l2 squared and d of known integers put into the gradient buffers, each parameter another;
- ``with_defect``: the same with one known defect of other frameworks put into the counting at a time;
- ``reference``, on one process and with PROBE_REFERENCE: the same numbers by float64 autograd over the same samples.

PROBE_FREEZE names parameters that are frozen in the model, by a regular expression.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy
import torch

import megatron_lion
from launch import pretrain_gpt
from megatron_lion.config import ALL_BATCHES
from megatron_lion.integration import compat
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting import gradient_shards
from megatron_lion.integration.reporting.norm_ratio import round_data, schedule
from megatron_lion.integration.reporting.norm_ratio.loop_round import run_round
from megatron_lion.integration.reporting.norm_ratio.measure import all_reduce
from megatron_lion.stats import GradientRound

VOCABULARY = (1 << 30, 0)  # no padding


def integer_of(name: str, layer: int | None) -> int:
    """A number from 1 to 9 for each parameter of the whole model; all experts of a layer share theirs."""
    name = re.sub(r"layers\.\d+|local_experts\.\d+", "", name)
    # A tied embedding is one parameter under two names.
    name = re.sub(r"embedding\.word_embeddings|output_layer", "vocabulary", name)
    return zlib.crc32(f"{name} {layer}".encode()) % 9 + 1


def count(model: list[Any], optimizer: Any, reduce: Callable[[torch.Tensor], None]) -> list[float]:
    """l1, l2 squared and d of the integers, as a round counts them."""
    from megatron.core import parallel_state as mpu

    for chunk in model:
        for name, param, layer in gradient_shards.named_parameters(chunk):
            param.main_grad.fill_(-integer_of(name, layer))
            if gradient_shards.is_expert(param) and mpu.get_expert_tensor_parallel_world_size() == 1:
                param.tensor_model_parallel = False  # as Transformer Engine's layers mark an expert that is not split
    shards = [shard for shard in gradient_shards.local_shards(model, optimizer, VOCABULARY) if shard.counted]
    measured = GradientRound([shard.as_counted() for shard in shards], tags=gradient_shards.tags(99))
    measured.add([shard.gradient for shard in shards], loss=0.0)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    record = measured.finish(reduce, rank=rank, world=world)
    return [record.l1, round(record.l2**2, 3), record.d]


def _dense_rank_for_experts(param: Any) -> bool:
    """Megatron up to 0.18.2: the dense tensor-parallel rank decides for experts too (issue 5916)."""
    from megatron.core import parallel_state as mpu

    split = getattr(param, "tensor_model_parallel", False)
    return not getattr(param, "shared", False) and (split or mpu.get_tensor_model_parallel_rank() == 0)


def _tied_copy_counts(param: Any) -> bool:
    """The copy of the embedding on the last stage is counted again (issue 7228)."""
    return bool(getattr(param, "shared", False)) or STOCK_IS_COUNTED(param)


def _tensor_parallel_copies_count(param: Any) -> bool:
    """What every tensor-parallel rank holds is counted on each (as issue 6470, in the other direction)."""
    return not getattr(param, "shared", False)


def _without_tensor_parallel_sum(vector: torch.Tensor) -> None:
    """gpt-neox's noise scale: the sum over tensor-parallel ranks is forgotten."""
    from megatron.core import parallel_state as mpu

    all_reduce(vector)
    vector /= mpu.get_tensor_model_parallel_world_size()


def _divided_by_pipeline_size(vector: torch.Tensor) -> None:
    """gpt-neox's noise scale: the sum over pipeline stages is divided by their number."""
    from megatron.core import parallel_state as mpu

    all_reduce(vector)
    vector /= mpu.get_pipeline_model_parallel_world_size()


STOCK_IS_COUNTED = gradient_shards.is_counted
DEFECTS: dict[str, Callable[..., Any]] = {
    "dense rank for experts": _dense_rank_for_experts,
    "tied copy counts": _tied_copy_counts,
    "tensor-parallel copies count": _tensor_parallel_copies_count,
    "no tensor-parallel sum": _without_tensor_parallel_sum,
    "divided by the pipeline's size": _divided_by_pipeline_size,
}


def count_with(defect: Callable[..., Any], model: list[Any], optimizer: Any) -> list[float]:
    """:func:`count` with one of ``DEFECTS``."""
    if defect in (_without_tensor_parallel_sum, _divided_by_pipeline_size):
        return count(model, optimizer, defect)
    with mock.patch.object(gradient_shards, "is_counted", defect):
        return count(model, optimizer, all_reduce)


def reference(step: Step, dataset: Any, batches: int | Literal["all"], iteration: int) -> dict[str, float]:
    """Loss, l1, l2 and KKT residual of the round's samples by float64 autograd, one process, no DDP, no schedule."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
    model = step.model[0].module
    stock = dict(model.named_parameters())
    double = {name: param.detach().double().requires_grad_() for name, param in stock.items()}
    indices = numpy.arange(len(dataset))
    if batches != ALL_BATCHES:
        count = batches * get_num_microbatches() * args.micro_batch_size
        indices = round_data.draw_indices(len(dataset), seed=args.seed, iteration=iteration, count=count)
    samples = len(indices)
    total = torch.zeros((), dtype=torch.float64)
    for index in indices.tolist():
        sample = {key: torch.as_tensor(value)[None] for key, value in dataset[index].items()}
        inputs = (sample["tokens"], sample["position_ids"], sample.get("attention_mask"))
        losses = torch.func.functional_call(model, double, inputs, {"labels": sample["labels"]})
        loss = losses.double().mean() / samples
        loss.backward()
        total += loss.detach()
    decay = {
        param: group["weight_decay"]
        for part in getattr(step.optimizer, "chained_optimizers", [step.optimizer])
        for param, _, group in compat.updated_params(part)
    }
    l1 = sum(float(copied.grad.abs().sum()) for copied in double.values())
    l2 = sum(float(copied.grad.square().sum()) for copied in double.values()) ** 0.5
    inner = sum(decay[stock[name]] * float((copied.grad * copied.detach()).sum()) for name, copied in double.items())
    return {"samples": samples, "loss": float(total), "l1": l1, "l2": l2, "kkt_residual": l1 + inner}


def run_round_and_look(step: Step, datasets: list[Any], batches: int | Literal["all"], iteration: int) -> Any:
    """In the place of :func:`rounds.run_round`."""
    from megatron.training import get_args

    record, tokens = run_round(step, datasets, batches, iteration)
    answer = {
        "record": json.loads(record.to_json()) | {"samples": tokens // get_args().seq_length},
        "counted": count(step.model, step.optimizer, all_reduce),
        "with_defect": {name: count_with(defect, step.model, step.optimizer) for name, defect in DEFECTS.items()},
    }
    if torch.distributed.get_world_size() == 1 and "PROBE_REFERENCE" in os.environ:
        answer["reference"] = reference(step, datasets[0], batches, iteration)
    path = Path(os.environ["PROBE_OUTPUT"]) / f"rank{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(answer))
    return record, tokens


def freeze(pattern: str) -> None:
    """Let every model be built with the parameters frozen in whose names ``pattern`` is found."""
    from megatron.core.models.gpt import GPTModel

    stock_init = GPTModel.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        for name, param in self.named_parameters():
            param.requires_grad_(not re.search(pattern, name))

    GPTModel.__init__ = init


if __name__ == "__main__":
    megatron_lion.register()
    schedule.run_round = run_round_and_look
    if "PROBE_FREEZE" in os.environ:
        freeze(os.environ["PROBE_FREEZE"])
    pretrain_gpt.main()
