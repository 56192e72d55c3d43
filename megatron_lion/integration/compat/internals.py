"""Wrappers around Megatron internals."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_lion.integration.compat.patching import temporarily, wrap
from megatron_lion.integration.compat.versions import installed_traits


def _compile_helpers(stock: Callable[[], None]) -> None:
    """Let training start from the wheel, which ships the compiled dataset helpers but no Makefile to compile them with.

    Stock runs ``make`` anyway and exits when it fails (0.19.2: initialize 178). A checkout has the Makefile and still
    compiles. Remove this when the wheel's own loop starts without it.
    """
    import megatron.core.datasets.utils as dataset_utils

    if (Path(dataset_utils.__file__).parent / "Makefile").is_file():
        stock()


WHEEL_WITHOUT_MAKEFILE = wrap("megatron.core.datasets.utils:compile_helpers", _compile_helpers)


def _fp32_state() -> dict[str, Any]:
    """How Megatron's settings describe state in fp32."""
    import torch  # here: `megatron-lion doctor` reports a missing torch

    names = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return dict.fromkeys(names, torch.float32)


def without_step() -> contextlib.AbstractContextManager[None]:
    """Let DistributedOptimizer save and load an optimizer that has no ``step`` tensor.

    Where neither Transformer Engine nor Apex is installed, its ``state_dict`` (0.19.2: distrib_optimizer 837) and
    ``load_state_dict`` (1025) read torch Adam's ``step`` from every parameter's state. Lion and SGD have none. The
    other branch reads ``step`` from the groups, which have it. Remove this when Megatron asks the optimizer.
    """
    from megatron.core.optimizer import distrib_optimizer

    return temporarily(distrib_optimizer, HAVE_APEX_OR_TE=True)


def one_epoch_of_sentences() -> contextlib.AbstractContextManager[None]:
    """Let Megatron build one epoch of a dataset of sentences (BERT).

    Without a number of samples it passes None to a C++ function that takes a number (0.19.2: masked_dataset 214).
    """
    from megatron.core.datasets import helpers

    stock_build_mapping = helpers.build_mapping

    def build_mapping(documents: Any, sizes: Any, epochs: int, max_samples: int | None, *rest: Any) -> Any:
        limit = 2**63 - 1 if max_samples is None else max_samples
        return stock_build_mapping(documents, sizes, epochs, limit, *rest)

    return temporarily(helpers, build_mapping=build_mapping)


@contextlib.contextmanager
def folding_the_clip_factor(fold: Callable[[list[Any], Any], bool]) -> Iterator[None]:
    """Offer each clip factor that Megatron is about to multiply into gradients to ``fold``, which may apply it instead.

    The factor is 1 or less, a number, or a tensor where Megatron's norm is one (with Transformer Engine or Apex).

    ``ChainedOptimizer.step`` (0.19.2: optimizer 1875) scales all gradients in place, one more read and write of each.
    """
    from megatron.core.optimizer import optimizer

    stock_clip = optimizer.clip_grad_by_total_norm_fp32

    def clip(parameters: list[Any], max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        factor = max_norm / (total_norm + 1.0e-6)  # clip_grads 178
        if not fold(parameters, min(factor, 1.0) if isinstance(factor, float) else factor.clamp(max=1.0)):
            stock_clip(parameters, max_norm, total_norm, use_decoupled_grad)

    with temporarily(optimizer, clip_grad_by_total_norm_fp32=clip):
        yield


@contextlib.contextmanager
def gradient_norm_by(l2_norm: Callable[[list[Any]], Any]) -> Iterator[None]:
    """Let Megatron's gradient norm call ``l2_norm`` for the 2-norm of a rank's gradients: a one-element fp32 tensor.

    ``get_grad_norm_fp32`` (0.19.2: clip_grads 115) passes it the gradients that Megatron counts on this rank, and adds
    up the squares over ranks. ``l2_norm`` may return None, and then Megatron computes the norm.
    """
    from megatron.core.optimizer import clip_grads

    stock = clip_grads.l2_norm_impl

    def l2_norm_impl(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Any]], *args: Any) -> Any:
        (grads,) = tensor_lists
        norm = l2_norm(grads)
        return stock(chunk_size, noop_flag, tensor_lists, *args) if norm is None else (norm, None)

    with temporarily(clip_grads, l2_norm_impl=l2_norm_impl):
        yield


def as_sgd(settings: Any) -> contextlib.AbstractContextManager[None]:
    """Call Lion "sgd" in ``settings``, a configuration or a command line, while Megatron reads it.

    Megatron passes every name except adam and sgd to its emerging optimizers, which turn --use-distributed-optimizer
    into a layer-wise optimizer (0.19.2: arguments 1671) and put embeddings and 1-D parameters on Adam.
    """
    return temporarily(settings, optimizer="sgd")


def without_precision_aware_settings(settings: Any) -> contextlib.AbstractContextManager[None]:
    """Hide Megatron's precision-aware settings, which it accepts only for Adam (0.19.2: optimizer_config 430)."""
    return temporarily(settings, use_precision_aware_optimizer=False, **_fp32_state())


def set_precision_aware(config: Any, needed: bool) -> None:
    """Choose whether DistributedOptimizer leaves master weights and 16-bit parameters to the optimizer inside it.

    OptimizerConfig's check allows that only for Transformer Engine's Adam, so the fields are set after it. The second
    one is what all of Megatron's code reads. Megatron sets it to False for some fp8 recipes (0.19.2: optimizer_config
    404), where its optimizer cannot write the fp8 weights; the caller has refused fp8 weights.
    """
    config.use_precision_aware_optimizer = needed
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = needed
    for name, dtype in _fp32_state().items():  # the dtypes of what checkpoints hold
        setattr(config, name, dtype)


def is_precision_aware(config: Any) -> bool:
    """Whether the optimizer inside DistributedOptimizer holds the master weights."""
    return bool(getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


def is_quantized(param: Any) -> bool:
    """Whether ``param`` is one of Transformer Engine's 8-bit or 4-bit tensors, which a copy must quantize into."""
    from megatron.core.optimizer import distrib_optimizer

    if installed_traits().has_fp4_parameters and distrib_optimizer.is_nvfp4tensor(param):
        return True
    if installed_traits().groups_quantized_parameters:
        return bool(distrib_optimizer.DistributedOptimizer._is_distopt_quantized_param(param))
    return bool(distrib_optimizer.is_float8tensor(param))


def offloading_with(optimizer_class: type) -> contextlib.AbstractContextManager[None]:
    """Let DistributedOptimizer rebuild its optimizer as ``optimizer_class`` (0.19.2: distrib_optimizer 779)."""
    from megatron.core.optimizer import distrib_optimizer

    return temporarily(distrib_optimizer, HybridDeviceOptimizer=optimizer_class)


def has_te_or_apex() -> bool:
    """Whether Megatron uses the Adam and SGD of Transformer Engine or NVIDIA's Apex instead of torch's."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return not USING_PYTORCH_OPTIMIZER


def sub_optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chained for dense and expert parameters, or ``optimizer`` if it is not a chain."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def updated_params(sub_optimizer: Any) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Each model parameter that ``sub_optimizer`` updates, the inner optimizer's tensor for it, and its group.

    The distributed optimizer and the one with fp32 copies of 16-bit parameters hold the model's parameters and
    the inner optimizer's; the fp32 one passes them on as they are.
    """
    groups = sub_optimizer.optimizer.param_groups
    if hasattr(sub_optimizer, "model_param_group_index_map"):
        for param, (index, order) in sub_optimizer.model_param_group_index_map.items():
            yield param, groups[index]["params"][order], groups[index]
    elif hasattr(sub_optimizer, "float16_groups"):
        kinds = (
            sub_optimizer.float16_groups,
            sub_optimizer.fp32_from_float16_groups,
            sub_optimizer.fp32_from_fp32_groups,
        )
        for half, copies, full, group in zip(*kinds, groups, strict=True):
            yield from ((param, copy, group) for param, copy in zip((*half, *full), (*copies, *full), strict=True))
    else:
        yield from ((param, param, group) for group in groups for param in group["params"])


def params_outside_the_norm(sub_optimizer: Any) -> list[Any]:
    """The parameters of an optimizer in Megatron's chain that its gradient norm leaves out.

    Call it when there are gradients. Marks on the parameters decide, so the answer does not change.
    """
    if sub_optimizer.optimizer is None:
        return []
    seen = {id(grad) for grad in getattr(sub_optimizer, installed_traits().gradients_of_the_norm)()}
    return [param for param in sub_optimizer.get_parameters() if id(gradient_of(sub_optimizer, param)) not in seen]


def reduces_norm_over_all_ranks(sub_optimizer: Any) -> bool:
    """Whether the gradient norm of an optimizer in Megatron's chain is a sum over every rank."""
    import torch

    group = sub_optimizer.get_grad_stats_parallel_group()
    return torch.distributed.get_world_size(group) == torch.distributed.get_world_size()


def gradient_of(sub_optimizer: Any, param: Any) -> Any:
    """The gradient of ``param``, one of the parameters of ``sub_optimizer``; None if it has none.

    With Megatron-FSDP it is this rank's part of it, as Megatron's gradient norm takes it (0.19.2: optimizer 265).
    """
    grad = getattr(param, "decoupled_grad" if is_precision_aware(sub_optimizer.config) else "grad", None)
    return getattr(grad, "_local_tensor", grad)


def uses_megatron_fsdp(model_chunks: list[Any]) -> bool:
    """Whether Megatron-FSDP shards the model."""
    return bool(getattr(getattr(model_chunks[0], "ddp_config", None), "use_megatron_fsdp", False))


def original(param: Any) -> Any:
    """The parameter of the model that Megatron-FSDP replaced by the DTensor ``param``; ``param`` itself if it did not.

    It has the shape of the tensor-parallel rank's parameter, and marks that the DTensor lacks.
    """
    return getattr(param, "orig_param", param)


def is_fsdp_param(param: Any) -> bool:
    """Whether ``param`` is a DTensor that Megatron-FSDP passes to the optimizer."""
    return hasattr(param, "orig_param")


def fsdp_range(param: Any) -> tuple[int, int]:
    """Start and stop of this rank's shard of ``param``, flattened, in the tensor-parallel rank's parameter."""
    whole, numel = original(param).numel(), param._local_tensor.numel()
    start = param.megatron_fsdp_slice.start if 0 < numel < whole else 0
    return start, start + numel


def rerun_disabled() -> contextlib.AbstractContextManager[None]:
    """Turn Megatron's rerun state machine off, as its evaluation does, without the log line of ``set_mode``."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    return temporarily(get_rerun_state_machine(), mode=RerunMode.DISABLED)


@contextlib.contextmanager
def moe_metrics_kept() -> Iterator[None]:
    """Let routers record their metrics separately, because the log sums its own until they are printed."""
    if not installed_traits().moe_metrics_are_objects:
        from megatron.core.transformer.moe import moe_utils

        with temporarily(moe_utils, _MOE_LAYER_WISE_LOGGING_TRACKER={}):
            yield
        return
    from megatron.core.transformer.moe import moe_logging

    kept = moe_logging.get_moe_metrics_tracker()
    moe_logging.set_moe_metrics_tracker(moe_logging.MoEMetricsTracker())
    try:
        yield
    finally:
        moe_logging.set_moe_metrics_tracker(kept)


def forked_random_states() -> contextlib.AbstractContextManager[None]:
    """Put back the random states of torch, the device and Megatron's tensor-parallel tracker on leaving."""
    from megatron.core.tensor_parallel.random import _fork_rng

    return _fork_rng()
