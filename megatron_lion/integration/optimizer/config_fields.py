"""Lion's options as fields of Megatron's ``OptimizerConfig``, added to the class in place.

So keywords, ``dataclasses.replace``, ``asdict``, subclasses and code that copies ``fields(OptimizerConfig)`` from a
command line carry them, and a misspelled option is a TypeError.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from megatron_lion.config import LionError, LionOptions, betas_or_default
from megatron_lion.integration import compat

# Name, type and default of each field. None: Lion's betas, or other settings decide (LionOptions.from_config).
FIELDS: dict[str, tuple[Any, Any]] = {
    "lion_beta1": (float | None, None),
    "lion_beta2": (float | None, None),
    "lion_kernel": (str, LionOptions.kernel),
    "lion_momentum_dtype": (str | None, None),
    "lion_master_weights": (str | None, None),
    "lion_gather": (str, LionOptions.gather),
    "lion_gather_refresh": (int, LionOptions.gather_refresh),
    "lion_reduce": (str, LionOptions.reduce),
    "lion_error_feedback": (str, LionOptions.error_feedback),
    "lion_fast_norm": (bool, LionOptions.fast_norm),
    "lion_init_from": (str | None, LionOptions.init_from),
    "lion_rates_from_run": (bool, LionOptions.rates_from_run),
    "lion_saves_stacks": (bool, LionOptions.saves_stacks),
}
BETAS = ("lion_beta1", "lion_beta2")
# Megatron's own default betas, for other optimizers that read them. It has the fields since 0.17.
_stock_betas: dict[str, float] = {}


def install() -> None:
    """Add the fields to OptimizerConfig and to Megatron's subclasses of it. Calling it again does nothing."""
    config_class = _config_class()
    if _has_fields(config_class):
        return
    stock = config_class.__dataclass_fields__
    _stock_betas.update({name: stock[name].default for name in BETAS if name in stock})
    types = {name: kind for name, (kind, _) in FIELDS.items()}
    config_class.__annotations__ = inspect.get_annotations(config_class) | types
    stock.update({name: dataclasses.field(default=default) for name, (_, default) in FIELDS.items()})
    for cls in (config_class, *_megatrons_subclasses(config_class)):
        _make_again(cls)


def refuse_earlier_subclasses() -> None:
    """Raise LionError for subclasses of OptimizerConfig that were defined before the fields, because they lack them."""
    config_class = _config_class()
    own_init = [cls for cls in _subclasses(config_class) if "__dataclass_fields__" in vars(cls)]  # others inherit it
    megatrons = _megatrons_subclasses(config_class)
    earlier = [cls for cls in own_init if not _has_fields(cls) and cls not in megatrons]
    if earlier:
        names = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in earlier)
        raise LionError(
            f"{names}: subclass of Megatron's OptimizerConfig that was defined before megatron_lion.register(), so it "
            "does not have Lion's options. Call megatron_lion.register() before you import that module"
        )


def refuse_earlier_instance(config: Any) -> None:
    """Raise LionError for a configuration that was made before the class had the fields."""
    if not FIELDS.keys() <= vars(config).keys():
        raise LionError(
            f"this {type(config).__name__} was made before megatron_lion.register(), so it does not have Lion's "
            "options. Call megatron_lion.register() first"
        )


def fill_betas(settings: Any) -> None:
    """Set the betas that are None in ``settings``, a configuration or a command line, to the optimizer's defaults."""
    if settings.optimizer == "lion":
        settings.lion_beta1, settings.lion_beta2 = betas_or_default(settings.lion_beta1, settings.lion_beta2)
        return
    for name, default in _stock_betas.items():
        if getattr(settings, name) is None:
            setattr(settings, name, default)


def stock_beta(name: str) -> float | None:
    """Megatron's own default of the field ``name``, which other optimizers have after :func:`fill_betas`, or None."""
    return _stock_betas.get(name)


def post_init(stock: Callable[[Any], None], config: Any) -> None:
    """Fill in the default betas, and let Megatron check the rest.

    Its check accepts precision-aware settings only for Adam. For Lion they choose how its state is stored.
    """
    fill_betas(config)
    is_lion = config.optimizer == "lion"
    with compat.without_precision_aware_settings(config) if is_lion else contextlib.nullcontext():
        stock(config)


CORE = (
    compat.wrap(
        "megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
        post_init,
        uses=("use_precision_aware_optimizer", "use_precision_aware_optimizer_no_fp8_or_ds_fp8"),
    ),
)


def _config_class() -> Any:
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    return OptimizerConfig


def _has_fields(cls: Any) -> bool:
    return FIELDS.keys() <= cls.__dataclass_fields__.keys()


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _megatrons_subclasses(config_class: type) -> list[type]:
    """Megatron's own subclasses: up to 0.17 one for Adam and one for SGD."""
    return [cls for cls in _subclasses(config_class) if cls.__module__ == config_class.__module__]


def _make_again(cls: Any) -> None:
    """Rebuild the dataclass ``cls`` with the fields that its annotations and its bases have now."""
    for name in inspect.get_annotations(cls):
        setattr(cls, name, cls.__dataclass_fields__[name])  # also where the default is a factory
    for name in ("__init__", *compat.GENERATED):  # the decorator writes them again
        if name in cls.__dict__:
            delattr(cls, name)
    dataclasses.dataclass(cls)
