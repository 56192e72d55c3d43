"""How Megatron comes to build our optimizer: a wrapper around its own ``get_megatron_optimizer``.

Megatron sends every name but adam and sgd to its "emerging" path, which hands embeddings and 1-D parameters to Adam. So
Lion is built where sgd is: the same parameter groups, buffers, process groups, grad scaler and mixed-precision
wrappers, for dense and for expert parameters, with our class in the place of SGD.
"""

import functools
from typing import Any

import torch

from megatron_lion.config import LionConfig, LionError
from megatron_lion.integration import compat, storage, summary
from megatron_lion.integration.distributed_optimizer import (
    LionChainedOptimizer,
    LionDistributedOptimizer,
    SGDDistributedOptimizer,
    TorchAdamDistributedOptimizer,
    init_lion_state,
    init_sgd_state,
)
from megatron_lion.lion import Lion

# What the optimizer's configuration carries of our flags; absent where a script uses megatron.core alone, which may set
# them on its OptimizerConfig.
CARRIED = {"lion_kernel": "auto", storage.MOMENTUM: "fp32", storage.MASTER: "fp32"}


def install() -> None:
    """Replace ``get_megatron_optimizer`` wherever it has been imported, and close the way that would miss it."""
    import megatron.core.optimizer as optimizers

    stock_get = optimizers.get_megatron_optimizer
    stock_emerging = optimizers._get_megatron_emerging_optimizer

    @functools.wraps(stock_get)
    def get_megatron_optimizer(config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any) -> Any:
        build = functools.partial(stock_get, config, model_chunks, *args, **kwargs)
        if config.optimizer == "lion":
            return _build_lion(optimizers, config, model_chunks, build)
        if config.optimizer == "sgd":
            with compat.substituted(optimizers, DistributedOptimizer=SGDDistributedOptimizer):
                return _with_init_state(build(), init_sgd_state)
        if config.optimizer == "adam" and not compat.has_te_or_apex():
            with compat.substituted(optimizers, DistributedOptimizer=TorchAdamDistributedOptimizer):
                return build()
        return build()

    @functools.wraps(stock_emerging)
    def _get_megatron_emerging_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.optimizer == "lion":
            raise LionError(
                "get_megatron_optimizer was imported before megatron_lion.register() in a way that it cannot see; "
                "stock Megatron would now train embeddings and 1-D parameters with Adam. Register first"
            )
        return stock_emerging(config, *args, **kwargs)

    compat.replace_everywhere(optimizers, "get_megatron_optimizer", get_megatron_optimizer)
    compat.replace_everywhere(optimizers, "_get_megatron_emerging_optimizer", _get_megatron_emerging_optimizer)


def install_config() -> None:
    """Let the configuration that ``megatron.training`` makes carry our flags: it copies its own fields alone."""
    import megatron.training.training as training

    stock_config = training.get_megatron_optimizer_config

    @functools.wraps(stock_config)
    def get_megatron_optimizer_config(args: Any) -> Any:
        if args.optimizer != "lion":
            return stock_config(args)
        with storage.stock_flags(args):
            made = stock_config(args)
        for name, default in CARRIED.items():
            setattr(made[0], name, getattr(args, name, default))
        return made

    compat.replace_everywhere(training, "get_megatron_optimizer_config", get_megatron_optimizer_config)


def _build_lion(optimizers: Any, config: Any, model_chunks: list[Any], build: Any) -> Any:
    if not config.decoupled_weight_decay:
        raise LionError("decoupled_weight_decay=False is not Lion, whose weight decay is decoupled: leave it True")
    lion_config = LionConfig(
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(config.lion_beta1, config.lion_beta2),
        **{name.removeprefix("lion_"): getattr(config, name, default) for name, default in CARRIED.items()},
    )
    stored = {"momentum_dtype": lion_config.momentum_dtype, "master_weights": lion_config.master_weights}
    if not storage.use_precision_aware_path(config, lion_config, model_chunks):
        stored = {}  # Megatron keeps the masters, and Lion's momentum has their dtype

    def lion_in_place_of_sgd(param_groups: Any, lr: float, weight_decay: float, momentum: float) -> Lion:
        inner = Lion(
            param_groups,
            lr=lr,
            betas=lion_config.betas,
            weight_decay=weight_decay,
            kernel=lion_config.kernel,
            **stored,  # type: ignore[arg-type]
        )
        inner.register_load_state_dict_post_hook(functools.partial(_keep_betas, lion_config))
        return inner

    stock_log = optimizers.log_single_rank

    def log_single_rank(logger: Any, level: int, message: str, *args: Any, **kwargs: Any) -> None:
        stock_log(logger, level, message.replace("optimizer='sgd'", "optimizer='lion'"), *args, **kwargs)

    with (
        compat.substituted(config, optimizer="sgd"),
        compat.substituted(
            optimizers,
            SGD=lion_in_place_of_sgd,
            DistributedOptimizer=LionDistributedOptimizer,
            ChainedOptimizer=LionChainedOptimizer,
            log_single_rank=log_single_rank,
        ),
    ):
        optimizer = _with_init_state(build(), init_lion_state)
    summary.report(lion_config, config, model_chunks, optimizer)
    return optimizer


def _with_init_state(optimizer: Any, init_state: Any) -> Any:
    """Give the wrappers that stock left without an ``init_state_fn``, and so unable to load a checkpoint, theirs."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None:
            part.init_state_fn = init_state
    return optimizer


def _keep_betas(lion_config: LionConfig, optimizer: torch.optim.Optimizer) -> None:
    """The command line's betas win over the checkpoint's, which torch would take over without a word."""
    loaded = {tuple(group["betas"]) for group in optimizer.param_groups} - {lion_config.betas}
    for group in optimizer.param_groups:
        group["betas"] = lion_config.betas
    if loaded:
        summary.say(f"betas {lion_config.betas} as asked; the checkpoint was written with {loaded.pop()}")
