"""How Megatron comes to build our optimizer: a wrapper around its own ``get_megatron_optimizer``.

Megatron sends every name but adam and sgd to its "emerging" path, which hands embeddings and 1-D parameters to Adam. So
Lion is built where sgd is: the same parameter groups, buffers, process groups, grad scaler and mixed-precision
wrappers, for dense and for expert parameters, with our class in the place of SGD.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_lion.config import LANGUAGE_MODEL_BETAS, LionConfig, LionError
from megatron_lion.integration import compat, console
from megatron_lion.integration.checkpoint import formats, group_settings
from megatron_lion.integration.checkpoint.init_from_adam import INIT_FROM
from megatron_lion.integration.flags import state_precision
from megatron_lion.integration.optimizer import offload, startup_report
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer
from megatron_lion.integration.optimizer.distributed import (
    LionDistributedOptimizer,
    SGDDistributedOptimizer,
    TorchAdamDistributedOptimizer,
    init_lion_state,
    init_sgd_state,
)
from megatron_lion.lion import Lion

# What the optimizer's configuration carries of our flags; absent where a script uses megatron.core alone, which may set
# them on its OptimizerConfig.
BETAS = dict(zip(("lion_beta1", "lion_beta2"), LANGUAGE_MODEL_BETAS, strict=True))  # no fields of it before 0.17
CARRIED = {"lion_kernel": "auto", state_precision.MOMENTUM: "fp32", state_precision.MASTER: "fp32"}


def get_megatron_optimizer(
    stock: Callable[..., Any], config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Build Lion where it is asked for; repair SGD and Adam where stock cannot save or load them."""
    import megatron.core.optimizer as optimizers

    build = functools.partial(stock, config, model_chunks, *args, **kwargs)
    if config.optimizer == "lion":
        return _build_lion(optimizers, config, model_chunks, build)
    if config.optimizer == "sgd":
        with compat.temporarily(optimizers, DistributedOptimizer=SGDDistributedOptimizer):
            return _with_init_state(build(), init_sgd_state)
    if config.optimizer == "adam" and not compat.has_te_or_apex():
        with compat.temporarily(optimizers, DistributedOptimizer=TorchAdamDistributedOptimizer):
            return build()
    return build()


def build_unless_lion(stock: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the function in which stock would come to build its own Lion: close the way that would miss ours."""
    if config.optimizer == "lion":
        raise LionError(
            "get_megatron_optimizer was imported before megatron_lion.register() in a way that it cannot see; "
            "stock Megatron would now build its own Lion, or none. Register first"
        )
    return stock(config, *args, **kwargs)


def get_megatron_optimizer_config(stock: Callable[..., Any], args: Any) -> Any:
    """Let the configuration that ``megatron.training`` makes be Lion's, and carry our flags.

    It copies its own fields alone, and before 0.18 refuses the name (0.17.1: training 1585).
    """
    if args.optimizer != "lion":
        return stock(args)
    with state_precision.stock_flags(args), compat.temporarily(args, optimizer="sgd"):
        made = stock(args)
    for name, default in {"optimizer": "lion", **BETAS, **CARRIED}.items():
        setattr(made[0], name, getattr(args, name, default))
    setattr(made[0], INIT_FROM, getattr(args, INIT_FROM, None))
    group_settings.carry(args, made[0])
    formats.carry(args, made[0])
    return made


CORE = (
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
)
TRAINING = (
    compat.wrap(
        "megatron.training.training:get_megatron_optimizer_config", get_megatron_optimizer_config, parameters=("args",)
    ),
)


def _build_lion(optimizers: Any, config: Any, model_chunks: list[Any], build: Any) -> Any:
    if not config.decoupled_weight_decay:
        raise LionError("decoupled_weight_decay=False is not Lion, whose weight decay is decoupled: leave it True")
    formats.refuse_layers_frozen_apart(config, model_chunks)
    default1, default2 = LANGUAGE_MODEL_BETAS
    lion_config = LionConfig(
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(getattr(config, "lion_beta1", default1), getattr(config, "lion_beta2", default2)),
        **{name.removeprefix("lion_"): getattr(config, name, default) for name, default in CARRIED.items()},
    )
    stored = {"momentum_dtype": lion_config.momentum_dtype, "master_weights": lion_config.master_weights}
    if not state_precision.use_precision_aware_path(config, lion_config, model_chunks):
        stored = {}  # Megatron keeps the masters, and Lion's momentum has their dtype

    def lion_in_place_of_sgd(param_groups: Any, lr: float, weight_decay: float, momentum: float) -> Lion:
        return Lion(
            param_groups,
            lr=lr,
            betas=lion_config.betas,
            weight_decay=weight_decay,
            kernel=lion_config.kernel,
            **stored,  # type: ignore[arg-type]
        )

    def hybrid_of_lions(param_groups: Any, **settings: Any) -> offload.OffloadingLion:
        return offload.build(lion_config, param_groups, **settings)

    stock_log = optimizers.log_single_rank

    def log_single_rank(logger: Any, level: int, message: str, *args: Any, **kwargs: Any) -> None:
        stock_log(logger, level, message.replace("optimizer='sgd'", "optimizer='lion'"), *args, **kwargs)

    with (
        compat.temporarily(config, optimizer="sgd"),
        compat.offloading_with(offload.OffloadingLion),
        compat.temporarily(
            optimizers,
            SGD=lion_in_place_of_sgd,
            HybridDeviceOptimizer=hybrid_of_lions,
            DistributedOptimizer=LionDistributedOptimizer,
            ChainedOptimizer=LionChainedOptimizer,
            log_single_rank=log_single_rank,
        ),
    ):
        optimizer = _with_init_state(build(), init_lion_state)
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if isinstance(sub_optimizer.optimizer, offload.LIONS):
            sub_optimizer.optimizer.register_load_state_dict_post_hook(functools.partial(_keep_betas, lion_config))
    startup_report.report(lion_config, config, model_chunks, optimizer)
    return optimizer


def _with_init_state(optimizer: Any, init_state: Any) -> Any:
    """Give the wrappers that stock left without an ``init_state_fn``, and so unable to load a checkpoint, theirs."""
    for sub_optimizer in compat.sub_optimizers_of(optimizer):
        if sub_optimizer.init_state_fn is None:
            sub_optimizer.init_state_fn = init_state
    return optimizer


def _keep_betas(lion_config: LionConfig, optimizer: torch.optim.Optimizer) -> None:
    """The command line's betas win over the checkpoint's, which torch would take over without a word."""
    loaded = {tuple(group["betas"]) for group in optimizer.param_groups} - {lion_config.betas}
    for group in optimizer.param_groups:
        group["betas"] = lion_config.betas
    if loaded:
        console.say(f"betas {lion_config.betas} as asked; the checkpoint was written with {loaded.pop()}")
