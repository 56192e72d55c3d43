"""Transformer Engine on a machine without a GPU: the Python of its wheel over a stand-in for its compiled extension.

Its layers can be built, also on the meta device. Only its layer norm and its functions for lists of tensors compute.
"""

import enum
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any

from tests import wheels
from tests.stand_ins import extensions

VERSION = "2.20.2"
VARIABLE = "MEGATRON_LION_TESTS_TRANSFORMER_ENGINE"
"""set to the wheel's folder, it makes ``preloaded`` install it"""


def folder() -> Path:
    """The folder with the wheel. Skips the test if it cannot be fetched."""
    return wheels.fetched(f"transformer-engine-{VERSION}", f"transformer-engine=={VERSION}")


class DType(enum.IntEnum):
    """Names and values of the extension's (transformer_engine.h)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FusedAttention(enum.IntEnum):
    """Of these two the package compares the members with its own."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class Enumeration(type):
    """A class that has every member, each a number."""

    numbers = itertools.count()

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, next(cls.numbers))
        return getattr(cls, name)


class Extension(types.ModuleType):
    """Every class is an enumeration, and every function refuses to compute."""

    DType = DType
    NVTE_Fused_Attn_Backend = FusedAttention
    multi_tensor_l2norm = staticmethod(extensions.l2norm)
    multi_tensor_scale = multi_tensor_scale_tensor = staticmethod(extensions.scale)
    multi_tensor_adam = staticmethod(extensions.adam)
    layernorm_fwd = staticmethod(extensions.layernorm_fwd)
    layernorm_bwd = staticmethod(extensions.layernorm_bwd)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name} needs a GPU")

        setattr(self, name, Enumeration(name, (), {}) if name[0].isupper() else refuse)
        return getattr(self, name)

    def get_cudnn_version(self) -> int:
        return 92000

    def get_cublasLt_version(self) -> int:
        return 130100


def install(wheel: Path) -> None:
    """Make ``transformer_engine.pytorch`` importable in this process, before Megatron is imported."""
    sys.path.insert(0, str(wheel))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # else it loads its CUDA library
    import transformer_engine.common as common

    names = ("transformer_engine_torch", "transformer_engine.pytorch.onnx_extensions")  # the second needs onnxscript
    common.load_framework_extension = lambda framework: sys.modules.update({name: Extension(name) for name in names})
    import transformer_engine.pytorch  # noqa: F401
