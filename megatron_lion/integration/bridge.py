"""Lion in Megatron-Bridge without registration: a configuration that builds its optimizer itself.

Bridge calls ``provide`` of an optimizer configuration that has it (0.6.2: training/optim.py), instead of Megatron's
``get_megatron_optimizer``. So nothing in Megatron is replaced, and the order of imports does not matter.
"""

import dataclasses
from typing import Any

from megatron.bridge.training.config import OptimizerConfig
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.optimizer import config_fields, factory

register_allowed_target_prefix(__name__)  # Bridge's YAML names the class below, and Bridge makes only what is allowed
_FIELDS = [(name, kind, dataclasses.field(default=default)) for name, (kind, default) in config_fields.FIELDS.items()]
_WithFields: Any = dataclasses.make_dataclass("_WithFields", _FIELDS, bases=(OptimizerConfig,), module=__name__)


@dataclasses.dataclass
class LionOptimizerConfig(_WithFields):
    """Bridge's ``OptimizerConfig`` with Lion's options as fields, and Lion as the optimizer.

    Raises LionError in ``finalize`` for another optimizer, and where Lion is built for options or a model that it does
    not support.
    """

    optimizer: str = "lion"

    def finalize(self) -> None:
        """Fill in Lion's default betas, and let Megatron check the rest."""
        if self.optimizer != "lion":
            raise LionError(
                f"LionOptimizerConfig builds only lion, got optimizer={self.optimizer!r}: use Bridge's OptimizerConfig "
                "for another optimizer, or remove the override"
            )
        config_fields.fill_betas(self)
        with compat.without_precision_aware_settings(self):
            super().finalize()

    def provide(self, model_chunks: list[Any], **arguments: Any) -> Any:
        """Build the optimizer. Bridge calls this with the arguments of ``get_megatron_optimizer``."""
        return factory.build_lion(self, model_chunks, **arguments)
