"""Wrappers around Megatron's buffers of parameters and gradients: their buckets, and what ranks exchange of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_lion.integration.compat.patching import temporarily
from megatron_lion.integration.compat.versions import installed_traits


def shard_range(sub_optimizer: Any, param: Any) -> tuple[int, int]:
    """Start and stop of this rank's shard of ``param``, flattened, in the distributed optimizer ``sub_optimizer``."""
    shard = sub_optimizer._get_model_param_range_map(param)["param"]
    return shard.start, shard.end


def range_in_bucket(sub_optimizer: Any, param: Any) -> tuple[Any, int, int]:
    """The bucket of ``param`` in the distributed optimizer ``sub_optimizer``, and where this rank's shard of ``param``
    starts and stops in the bucket's ``param_data``, flattened."""
    span = sub_optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
    buffer, _, bucket = sub_optimizer.model_param_gbuf_map[param]
    return sub_optimizer.buffers[buffer].buckets[bucket], span.start, span.end


def gather_is_dispatched(bucket_group: Any, handle: Any = None) -> None:
    """Tell Megatron that the gather of a bucket group's parameters is under way, or done if there is no ``handle``.

    Megatron calls ``handle.wait()`` before the forward pass of the group's modules.
    """
    bucket_group.param_gather_handle = handle
    bucket_group.param_gather_dispatched = True


def wait_for_gather(bucket_group: Any) -> None:
    """Wait for the gather of a bucket group's parameters, if one is under way."""
    if bucket_group.param_gather_handle is not None:
        bucket_group.param_gather_handle.wait()
        bucket_group.param_gather_handle = None


@contextlib.contextmanager
def reducing_with(reduce_scatter: Callable[..., Any]) -> Iterator[None]:
    """Let a bucket group's ``start_grad_sync`` call ``reduce_scatter(output, input, op, group, async_op)`` for each of
    its buckets, with ``output`` this rank's shard in ``input``. It looks the function up at each call."""
    from megatron.core.distributed import param_and_grad_buffer

    with temporarily(param_and_grad_buffer, dist_reduce_scatter_func=reduce_scatter):
        yield


def finish_reduction_with(group: Any, handle: Any) -> None:
    """Let the ``finish_grad_sync`` of a bucket group wait for ``handle``, in the place of Megatron's own."""
    group.grad_reduce_handle = handle


def is_reduced_again(param: Any) -> bool:
    """Whether Megatron adds the gradient of ``param`` up over other ranks after the data-parallel reduction.

    These are norms, biases, routers and the like under tensor parallelism, and embeddings that pipeline stages share
    (0.19.2: finalize_model_grads 89, 164, 262, 278, 412).
    """
    marks = (
        "sequence_parallel",
        "average_gradients_across_tp_domain",
        "pipeline_parallel",
        "shared_embedding",
        "shared",
        "flextron_router_pp_sync",
    )
    return any(getattr(param, mark, False) for mark in marks)


def is_copied_over_tp(sub_optimizer: Any, param: Any) -> bool:
    """Whether each tensor-parallel rank has all of ``param``, as of learned positions and routers.

    The copies must receive equal gradients: nothing makes them equal later. Experts are on other ranks, not copied.
    """
    group = getattr(sub_optimizer, "tp_group", None)  # from 0.17 on
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    is_whole = not getattr(param, "tensor_model_parallel", False) and getattr(param, "allreduce", True)
    return is_whole and group is not None and group.size() > 1


def gather_parameters(model_chunks: list[Any], optimizer: Any, *, hooked: bool) -> None:
    """Finish the all-gather of parameters that overlaps with the forward pass, as Megatron's evaluation does.

    If the hooks that wait for it are on (``hooked``), they are removed. The chunk's ``enable_forward_pre_hook`` adds
    them again.
    """
    if installed_traits().sync_asks_optimizer:
        optimizer.prepare_model_params_for_param_sync()
    for chunk in model_chunks:
        if hooked:
            chunk.disable_forward_pre_hook(param_sync=True)
        else:
            chunk.start_param_sync(force_sync=True)
