"""Gradients by shard, and which rank counts each of them.

After a backward pass every gradient is in Megatron's buffers, reduced over data-parallel ranks: whole on each of them,
or, with the distributed optimizer, valid only in this rank's shard. Megatron-FSDP attaches this rank's part of it to
the parameter, a DTensor. In any layout exactly one rank counts each element:

- data parallel: a rank counts its shard; without the distributed optimizer it counts an even slice, which makes no
  difference to a sum and spreads memory and work. Expert parameters have a data-parallel group of their own.
- several distributed-optimizer instances hold the same shards: the first one counts. So do Megatron-FSDP's copies.
- tensor parallel: a parameter that is split counts everywhere, one that every rank holds (norms, biases of row-parallel
  layers, the router) on the first rank of its group. For experts that is the expert-tensor-parallel group, which has
  other ranks than the dense one if the two sizes differ (Megatron issue 5916).
- pipeline: the copy of a tied embedding on the last stage does not count (issue 7228); the first stage's holds the
  whole gradient.
- frozen parameters have no gradient and are left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_lion.integration import compat
from megatron_lion.stats import Counted
from megatron_lion.step import local_tensor

# The kind of a parameter is the first one with a pattern that its name has. Norms first: Transformer Engine keeps a
# norm's weight inside the linear layer behind it.
KINDS = {
    "norm": r"norm",
    "embedding": r"embedding",
    "output": r"output_layer|lm_head|binary_head|pooler",
    "router": r"\.router\.",
    "attention": r"attention",
    "mlp": r"\.mlp\.",
    "other": r"",
}
VOCABULARY = re.compile(r"(word_embeddings\.weight|output_layer\.(weight|bias))$")
LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The elements ``start`` to ``stop`` of one flattened parameter; this rank has their reduced gradient."""

    name: str
    param: Any  # a torch.nn.Parameter, to which Megatron gives a main_grad
    start: int
    stop: int
    weight_decay: float
    counted: bool
    kind: str
    layer: int | None
    """counted from 1 over the whole model; None outside the layers"""
    padding: int
    """how many of the elements lie in padded vocabulary rows"""

    @property
    def gradient(self) -> torch.Tensor:
        """A view of Megatron's buffer, in its dtype: the gradient of the last backward pass, loss scale included.

        With Megatron-FSDP and 16-bit parameters, a copy in the dtype of its main weights.
        """
        if compat.is_fsdp_param(self.param):
            return local_tensor(self.param.grad).view(-1)
        return self.param.main_grad.view(-1)[self.start : self.stop]

    def as_counted(self) -> Counted:
        """The shard for a round. Theta is the model's own parameter, at which the gradient was computed, not the
        optimizer's fp32 copy."""
        layers = () if self.layer is None else (("layers", str(self.layer)),)
        if compat.is_fsdp_param(self.param):  # it is the main weight, which each step copies to the model's
            value = local_tensor(self.param.detach()).view(-1).to(compat.original(self.param).dtype)
        else:
            value = self.param.detach().view(-1)[self.start : self.stop]
        return Counted(
            name=self.name,
            value=value,
            weight_decay=self.weight_decay,
            padding=self.padding,
            tags=(("kinds", self.kind), *layers),
        )


def tags(num_layers: int) -> list[tuple[str, str]]:
    """Every tag that a shard of a model with ``num_layers`` layers may have, in an order that all ranks share."""
    return [("kinds", kind) for kind in KINDS] + [("layers", str(layer + 1)) for layer in range(num_layers)]


def local_shards(model_chunks: list[Any], optimizer: Any, vocabulary: tuple[int, int]) -> list[Shard]:
    """This rank's shards of the gradients of all trained parameters. Issues no collective.

    Args:
        model_chunks: the model of this rank, one chunk for each of its pipeline stages.
        optimizer: Megatron's optimizer around Lion, SGD or Adam, with or without sharded state.
        vocabulary: the tokenizer's number of words, and the padded number.
    """
    # The model has Megatron-FSDP's parameters or the original ones, by what has run last.
    owned = {compat.original(owned.param): owned for owned in _owned(optimizer)}
    return [
        Shard(
            name=name,
            param=own.param,
            start=own.start,
            stop=own.stop,
            weight_decay=own.weight_decay,
            counted=own.first_copy and is_counted(own.param),
            kind=kind_of(name),
            layer=layer,
            padding=_padding(name, compat.original(own.param), own.start, own.stop, vocabulary),
        )
        for chunk in model_chunks
        for name, param, layer in named_parameters(chunk)
        if (own := owned.get(compat.original(param))) is not None
    ]


def expected_elements(model_chunks: list[Any]) -> int:
    """This rank's share of the number of elements to count: all that it has, on the first data-parallel rank."""
    params = (param for chunk in model_chunks for param in chunk.parameters() if param.requires_grad)
    here = (compat.original(param) for param in params if is_counted(param) and data_parallel_group(param).rank() == 0)
    return sum(param.numel() for param in here)


def is_counted(param: torch.nn.Parameter) -> bool:
    """Whether this rank's copy of ``param`` is the one, over tensor-parallel ranks and pipeline stages, that counts."""
    if is_tied_copy(param):
        return False
    return bool(getattr(compat.original(param), "tensor_model_parallel", False)) or tensor_parallel_rank(param) == 0


def counts_here(sub_optimizer: Any, param: Any) -> bool:
    """Whether this rank counts the elements of ``param`` that ``sub_optimizer`` updates: its shard, or all of them."""
    if compat.is_fsdp_param(param):
        return is_counted(param) and _is_first_copy(param)
    if hasattr(sub_optimizer, "distributed_optimizer_instance_id"):
        return is_counted(param) and sub_optimizer.distributed_optimizer_instance_id == 0
    return is_counted(param) and data_parallel_group(param).rank() == 0


def _is_first_copy(param: Any) -> bool:
    """Whether this rank's shard of Megatron-FSDP's ``param`` is the first of its copies, one on each rank of a mesh."""
    places = zip(param.device_mesh.get_coordinate(), param.placements, strict=False)
    return not any(rank for rank, place in places if place.is_replicate())


def is_tied_copy(param: torch.nn.Parameter) -> bool:
    """Whether ``param`` is the last stage's copy of an embedding that the first stage holds."""
    return bool(getattr(param, "shared", False))


def tensor_parallel_rank(param: torch.nn.Parameter) -> int:
    """This rank's place among those that ``param`` is split over, or that each hold it whole."""
    from megatron.core import parallel_state as mpu

    return int(mpu.get_expert_tensor_parallel_rank() if is_expert(param) else mpu.get_tensor_model_parallel_rank())


def is_expert(param: torch.nn.Parameter) -> bool:
    """Whether ``param`` belongs to one expert and is reduced over the experts' own groups."""
    return not getattr(compat.original(param), "allreduce", True)


def data_parallel_group(param: torch.nn.Parameter) -> Any:
    """The ranks that hold the same copy of ``param`` and see other batches."""
    from megatron.core import parallel_state as mpu

    if is_expert(param):
        return mpu.get_expert_data_parallel_group()
    return mpu.get_data_parallel_group(with_context_parallel=True)


def kind_of(name: str) -> str:
    """The first of ``KINDS`` with a pattern that ``name`` has."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def named_parameters(chunk: Any) -> Iterator[tuple[str, torch.nn.Parameter, int | None]]:
    """Name without the wrappers' prefixes, parameter and layer of each trained parameter in a chunk."""
    modules = dict(chunk.named_modules())
    for full_name, param in chunk.named_parameters():
        if param.requires_grad:
            match = LAYER.match(full_name)
            layer = getattr(modules[match[1]], "layer_number", None) if match else None
            yield re.sub(r"^(module\.)+", "", full_name), param, layer


class _Owned(NamedTuple):
    """What this rank holds of the gradient of ``param``, by what the optimizer says."""

    param: torch.nn.Parameter
    start: int
    stop: int
    weight_decay: float
    first_copy: bool


def _owned(optimizer: Any) -> Iterator[_Owned]:
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if sub_optimizer.optimizer is None:  # this rank holds none of its parameters
            continue
        for param, _, group in compat.updated_params(sub_optimizer):
            if compat.is_fsdp_param(param):
                start, stop = compat.fsdp_range(param)
                first_copy = _is_first_copy(param)
            elif hasattr(sub_optimizer, "distributed_optimizer_instance_id"):
                start, stop = compat.shard_range(sub_optimizer, param)
                first_copy = sub_optimizer.distributed_optimizer_instance_id == 0
            else:
                dp, numel = data_parallel_group(param), param.numel()
                start, stop = (numel * rank // dp.size() for rank in (dp.rank(), dp.rank() + 1))
                first_copy = True
            if start < stop:
                yield _Owned(param, start, stop, float(group.get("weight_decay", 0.0)), first_copy)


def _padding(name: str, param: torch.nn.Parameter, start: int, stop: int, vocabulary: tuple[int, int]) -> int:
    """How many of the elements ``start`` to ``stop`` belong to words that the tokenizer does not have."""
    from megatron.core import parallel_state as mpu

    words, padded_words = vocabulary
    rows = param.shape[0]
    if not VOCABULARY.search(name) or rows * mpu.get_tensor_model_parallel_world_size() != padded_words:
        return 0
    real_rows = min(max(words - mpu.get_tensor_model_parallel_rank() * rows, 0), rows)
    return stop - max(start, min(stop, real_rows * (param.numel() // rows)))
