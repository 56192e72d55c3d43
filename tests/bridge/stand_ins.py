"""Megatron-Bridge on a CPU: what is stood in for, and which settings of a configuration change.

Stood in for by empty names, only in Bridge's own imports: Transformer Engine, Apex, ModelOpt, nvidia-resiliency-ext,
Energon, DLFw Inspect and toml. Megatron itself is imported without them, as everywhere in these tests. Nothing of them
is called in a run of a GPT without fp8.

``pretrain`` gets the same configuration as on a GPU, with gloo in the place of NCCL and without fused CUDA kernels.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from typing import Any

STOOD_IN_FOR = (
    "transformer_engine",
    "apex",
    "modelopt",
    "nvidia_resiliency_ext",
    "nvdlfw_inspect",
    "toml",
    "megatron.energon",
)


class AnyName(type):
    """A class that has every attribute, each of which is the class below."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class StandIn(metaclass=AnyName):
    """What each name of a module that is stood in for is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``STOOD_IN_FOR`` for imports in Bridge's files, and the modules below those."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(name == one or name.startswith(f"{one}.") for one in STOOD_IN_FOR):
            return None
        if isinstance(sys.modules.get(name.rpartition(".")[0]), StandInModule) or "/megatron/bridge/" in _importer():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = StandInModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _importer() -> str:
    """The file with the import statement that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename


def install() -> None:
    """Make Bridge importable, and let its ``pretrain`` run on a CPU. Megatron's CPU backend must be on."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    import megatron.core.extensions.transformer_engine as extension
    import megatron.core.transformer.transformer_block as transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # A save starts a process that holds a queue. Spawned, it would import the script without what is stood in for.
    inspect.unwrap(filesystem.get_write_results_queue).__defaults__ = ("fork",)
    extension.FP8GlobalStateManager = StandIn
    transformer_block.LayerNormImpl = WrappedTorchNorm
    sys.meta_path.append(StandInFinder())
    import megatron.bridge.training.pretrain as pretrain
    import megatron.bridge.training.setup as setup
    import megatron.bridge.training.train as train

    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    train.get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None
    pretrain.pretrain = functools.partial(on_cpu, pretrain.pretrain)


def on_cpu(stock: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """``pretrain`` with gloo and Megatron's local layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config.dist.distributed_backend = "gloo"
    config.model.transformer_layer_spec = get_gpt_layer_local_spec()
    config.model.transformer_impl = "local"
    for fusion in (
        "gradient_accumulation_fusion",
        "persist_layer_norm",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
    ):
        setattr(config.model, fusion, False)
    stock(config, *args, **kwargs)
