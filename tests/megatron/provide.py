"""Lion through the hook that Megatron-Bridge calls, without registration, on the ranks of a loop on megatron.core.

Bridge's configuration class is stood in for by a copy of it, which is made before this package's is imported. Prints
what Megatron's names are bound to, and whether a save before the first step loads.
"""

import dataclasses
import functools
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_lion.integration.cpu import megatron_patches, torch_cuda
from tests.megatron import first_save

PARTS_OF_BRIDGE = ("training", "training.config", "utils", "utils.instantiate_utils")


def stand_in_for_bridge() -> None:
    """What Bridge 0.6.2 has in two modules: an OptimizerConfig, and a list of classes that its YAML may name."""
    from megatron.core.optimizer import OptimizerConfig as CoreConfig

    @dataclasses.dataclass
    class OptimizerConfig(CoreConfig):
        def __post_init__(self) -> None:
            pass

        def finalize(self) -> None:
            super().__post_init__()

    for name in ("megatron.bridge", *(f"megatron.bridge.{part}" for part in PARTS_OF_BRIDGE)):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["megatron.bridge.training.config"].OptimizerConfig = OptimizerConfig  # type: ignore[attr-defined]
    allowed = sys.modules["megatron.bridge.utils.instantiate_utils"]
    allowed.register_allowed_target_prefix = lambda prefix: None  # type: ignore[attr-defined]


def provided(stock: Any, config: Any, model_chunks: list[Any]) -> Any:
    """As Bridge builds an optimizer from a configuration with ``provide`` (training/optim.py 96)."""
    import megatron.core.optimizer as optimizers

    config.finalize()
    with mock.patch.object(optimizers, "get_megatron_optimizer", stock):
        return config.provide(
            model_chunks=model_chunks, config_overrides=None, use_gloo_process_groups=False, pg_collection=None
        )


def refusal(config: Any) -> str:
    try:
        config.finalize()
    except ValueError as error:
        return str(error)
    return "none"


def main() -> None:
    torch_cuda.replace_cuda()
    for patch in megatron_patches.CORE:
        if patch.seam.is_needed:
            patch.apply()
    stand_in_for_bridge()
    import megatron.core.optimizer as optimizers
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stock = optimizers.get_megatron_optimizer, optimizers.OptimizerConfig
    from megatron_lion.integration.bridge import LionOptimizerConfig

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    # What first_save builds with.
    optimizers.OptimizerConfig = LionOptimizerConfig
    optimizers.get_megatron_optimizer = functools.partial(provided, stock[0])
    precision_aware = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}
    case: Any = ("fully_reshardable", True, True, {**precision_aware, "lion_kernel": "fused"})
    _, model, optimizer = first_save.build(*case)
    never_saved = first_save.stepped(model, optimizer)
    folders = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folders, src=0)
    loaded = first_save.stepped(*first_save.saved_and_loaded(case, Path(str(folders[0]))))
    same = all(torch.equal(one, other) for one, other in zip(never_saved, loaded, strict=True))
    optimizers.get_megatron_optimizer, optimizers.OptimizerConfig = stock
    if torch.distributed.get_rank() == 0:
        print("CASE loaded:", "same weights" if same else "other weights")
        print("CASE a plain configuration has Lion's options:", hasattr(stock[1](), "lion_kernel"))
        print("CASE get_megatron_optimizer is wrapped:", hasattr(stock[0], "wrapper"))
        print("CASE another optimizer:", refusal(LionOptimizerConfig(optimizer="adam")), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
