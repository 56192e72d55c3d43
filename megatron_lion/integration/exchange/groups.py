"""The bucket groups and the parameters of one distributed optimizer."""

from typing import Any

import torch


def bucket_groups_of(sub_optimizer: Any) -> list[Any]:
    """The bucket groups of the model's chunks that hold parameters of ``sub_optimizer``."""
    own = {id(bucket) for buffer in sub_optimizer.buffers for bucket in buffer.buckets}
    return [
        group
        for chunk in sub_optimizer.model_chunks
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        if group.buckets and all(id(bucket) in own for bucket in group.buckets)
    ]


def buffer_of(sub_optimizer: Any, bucket: Any) -> Any:
    """The gradient buffer of ``sub_optimizer`` that ``bucket`` is a part of."""
    (buffer,) = (buffer for buffer in sub_optimizer.buffers if any(one is bucket for one in buffer.buckets))
    return buffer


def param_starts(sub_optimizer: Any, bucket: Any) -> dict[torch.nn.Parameter, int]:
    """The first element of each parameter of ``bucket``, counted from the start of the bucket."""
    buffer = buffer_of(sub_optimizer, bucket)
    return {param: buffer.param_index_map[param][0] - bucket.offset for param in bucket.params}
