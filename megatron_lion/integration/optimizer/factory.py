"""Builds Lion in Megatron: a wrapper around ``get_megatron_optimizer``.

Megatron passes every name except adam and sgd to its "emerging" path, which puts embeddings and 1-D parameters on Adam.
So Lion is built where SGD is, with our class in its place: the same parameter groups, buffers, process groups, grad
scaler and mixed-precision wrappers, for dense and for expert parameters.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration import compat, console
from megatron_lion.integration.checkpoint import fsdp_dtensor
from megatron_lion.integration.exchange import block_reduce, sign_gather
from megatron_lion.integration.flags import state_precision
from megatron_lion.integration.optimizer import (
    config_fields,
    fast_norm,
    fsdp,
    muon_scalar,
    offload,
    refusals,
    startup_report,
)
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer
from megatron_lion.integration.optimizer.distributed import LionDistributedOptimizer, init_lion_state
from megatron_lion.integration.optimizer.sgd_and_adam import (
    SGDDistributedOptimizer,
    TorchAdamDistributedOptimizer,
    init_sgd_state,
)
from megatron_lion.integration.optimizer.sharded_lion import ShardedLion


def get_megatron_optimizer(
    stock: Callable[..., Any], config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Build Lion if asked for, also next to Muon; repair SGD and Adam where stock cannot save or load them."""
    import megatron.core.optimizer as optimizers

    build = functools.partial(stock, config, model_chunks, *args, **kwargs)
    if config.optimizer == "lion":
        return _build_lion(config, model_chunks, build)
    if config.optimizer == "sgd":
        with compat.temporarily(optimizers, DistributedOptimizer=SGDDistributedOptimizer):
            return _with_init_state(build(), init_sgd_state)
    if config.optimizer == "adam" and not compat.has_te_or_apex():
        with compat.temporarily(optimizers, DistributedOptimizer=TorchAdamDistributedOptimizer):
            return build()
    if muon_scalar.is_asked(config):
        with muon_scalar.lion_for_the_rest(config):
            return build()
    return build()


def build_lion(config: Any, model_chunks: list[Any], **kwargs: Any) -> Any:
    """Build Lion with the arguments of ``get_megatron_optimizer``, without registration.

    Raises LionError if this Megatron is not supported, for Megatron-FSDP, and as registration's
    ``get_megatron_optimizer`` does.
    """
    import megatron.core.optimizer as optimizers

    compat.require_supported_version()
    compat.require(compat.seams_of(training=False))
    if compat.uses_megatron_fsdp(model_chunks) and not fsdp_dtensor.is_registered():
        raise LionError("Lion's checkpoints of Megatron-FSDP need megatron_lion.register(): call it first")
    stock = inspect.unwrap(optimizers.get_megatron_optimizer)
    optimizer = _build_lion(config, model_chunks, functools.partial(stock, config, model_chunks, **kwargs))
    for name in ("sharded_state_dict", "save_parameter_state"):
        setattr(optimizer, name, functools.partial(with_state, getattr(type(optimizer), name), optimizer))
    return optimizer


def build_unless_lion(stock: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the function that would build stock's Lion: raise an error if ours was not built before."""
    if config.optimizer == "lion":
        raise LionError(
            "get_megatron_optimizer was imported before megatron_lion.register() and cannot be replaced there; stock "
            "Megatron would now build its own Lion, or none. Call megatron_lion.register() first"
        )
    return stock(config, *args, **kwargs)


def with_state(stock: Callable[..., Any], chain: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a save: make the state of Lion and SGD, which does not exist before the first step.

    Megatron would fail, or save a checkpoint that it cannot load. The state begins as the first step would begin it.
    With --lion-reduce, Lion's momentum receives what was not sent, which checkpoints do not hold.
    """
    if not inspect.signature(stock).bind(chain, *args, **kwargs).arguments.get("is_loading"):
        block_reduce.flush(chain)
    for sub_optimizer in chain.chained_optimizers:
        if sub_optimizer.optimizer is not None and sub_optimizer.init_state_fn in (init_lion_state, init_sgd_state):
            sub_optimizer.init_state_fn(sub_optimizer.optimizer, sub_optimizer.config)
    return stock(chain, *args, **kwargs)


def get_megatron_optimizer_config(stock: Callable[..., Any], args: Any) -> Any:
    """Let ``megatron.training`` make Lion's configuration. Up to 0.17 it refuses the name (0.17.1: training 1585).

    Later releases copy the configuration's fields, Lion's options among them.
    """
    if args.optimizer != "lion":
        return stock(args)
    with compat.without_precision_aware_settings(args), compat.as_sgd(args):
        made = stock(args)
    made[0].optimizer = "lion"
    return made


CORE = (
    *config_fields.CORE,
    compat.wrap(
        "megatron.core.optimizer:get_megatron_optimizer",
        get_megatron_optimizer,
        parameters=("config", "model_chunks"),
        uses=("_get_megatron_optimizer_based_on_param_groups", "ChainedOptimizer", "log_single_rank"),
    ),
    compat.wrap(
        "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
        build_unless_lion,
        parameters=("config",),
        until="0.17",
    ),
    compat.wrap(
        "megatron.core.optimizer:_get_megatron_emerging_optimizer",
        build_unless_lion,
        parameters=("config", "model_chunks"),
        since="0.18",
    ),
    compat.wrap("megatron.core.optimizer:ChainedOptimizer.sharded_state_dict", with_state, parameters=("is_loading",)),
    compat.wrap("megatron.core.optimizer:ChainedOptimizer.save_parameter_state", with_state, parameters=("filename",)),
)
TRAINING = (
    compat.wrap(
        "megatron.training.training:get_megatron_optimizer_config",
        get_megatron_optimizer_config,
        parameters=("args",),
        until="0.17",
    ),
)


def _build_lion(config: Any, model_chunks: list[Any], build: Callable[[], Any]) -> Any:
    """Build Lion with ``build``, which is Megatron's function for the model, in the place of SGD."""
    import megatron.core.optimizer as optimizers

    config_fields.refuse_earlier_instance(config)
    options = LionOptions.from_config(config)
    refusals.refuse_where_built(config, options, model_chunks)
    fast_norm.check(options, model_chunks)
    options.write_to(config)
    stored = {"momentum_dtype": options.momentum_dtype, "master_weights": options.master_weights}
    is_fsdp = compat.uses_megatron_fsdp(model_chunks)
    if is_fsdp:  # it holds the masters, in fp32
        compat.set_precision_aware(config, False)
    elif not state_precision.use_precision_aware_path(config, options, model_chunks):
        stored = {}  # Megatron keeps the masters, and Lion's momentum has their dtype
    with (
        compat.as_sgd(config),
        compat.offloading_with(offload.OffloadingLion),
        compat.temporarily(
            optimizers,
            SGD=functools.partial(_lion_in_place_of_sgd, options, stored),
            HybridDeviceOptimizer=functools.partial(offload.build, options),
            DistributedOptimizer=fsdp.LionFSDPOptimizer if is_fsdp else LionDistributedOptimizer,
            ChainedOptimizer=LionChainedOptimizer,
            log_single_rank=functools.partial(_log_the_real_name, optimizers.log_single_rank),
        ),
    ):
        optimizer = _with_init_state(fsdp.in_a_chain(build(), LionChainedOptimizer), init_lion_state)
    optimizer.options = options
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        sub_optimizer.options = options
        if isinstance(sub_optimizer.optimizer, offload.LIONS):
            sub_optimizer.optimizer.register_load_state_dict_post_hook(functools.partial(_keep_betas, options))
    if options.gather == "signs":
        sign_gather.install(options, optimizer)
    if options.reduce != "stock":
        block_reduce.install(options, optimizer)
    startup_report.report(options, config, model_chunks, optimizer)
    return optimizer


def _lion_in_place_of_sgd(
    options: LionOptions, stored: dict[str, str], param_groups: Any, lr: float, weight_decay: float, momentum: float
) -> ShardedLion:
    return ShardedLion(
        param_groups,
        lr=lr,
        betas=options.betas,
        weight_decay=weight_decay,
        kernel=options.kernel,
        **stored,  # type: ignore[arg-type]
    )


def _log_the_real_name(
    stock: Callable[..., None], logger: Any, level: int, message: str, *args: Any, **kwargs: Any
) -> None:
    stock(logger, level, message.replace("optimizer='sgd'", "optimizer='lion'"), *args, **kwargs)


def _with_init_state(optimizer: Any, init_state: Any) -> Any:
    """Set the ``init_state_fn`` of wrappers that stock leaves without one, so that they can load a checkpoint."""
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if sub_optimizer.init_state_fn is None:
            sub_optimizer.init_state_fn = init_state
    return optimizer


def _keep_betas(options: LionOptions, optimizer: torch.optim.Optimizer) -> None:
    """After a load: keep this run's betas, which torch would silently replace by the checkpoint's."""
    loaded = {tuple(group["betas"]) for group in optimizer.param_groups} - {options.betas}
    for group in optimizer.param_groups:
        group["betas"] = options.betas
    if loaded:
        console.say(f"betas {options.betas} as asked; the checkpoint was written with {loaded.pop()}")
