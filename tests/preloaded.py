"""Imported once by the server that ranks are forked from: what every run would spend ten seconds of each rank on.

Megatron as it is on a machine without a GPU, with nothing of this package registered: that is each run's own first act.
"""

import contextlib
import functools
import importlib
import inspect
import multiprocessing
import os
from pathlib import Path

from megatron_lion.integration import compat
from megatron_lion.integration.cpu import torch_cuda

if wheel := os.environ.get("MEGATRON_LION_TESTS_TRANSFORMER_ENGINE"):
    importlib.import_module("tests.transformer_engine").install(Path(wheel))
if os.environ.get(torch_cuda.DEVICE_VARIABLE) == "cpu":
    torch_cuda.replace_cuda()

LOOP = ("megatron.training", "megatron.training.argument_utils", "megatron.training.checkpointing")
MODULES = (
    *(LOOP if compat.has_training() else ("megatron.core.optimizer", "megatron.core.dist_checkpointing")),
    "megatron.core.models.gpt",
    "torch.utils.tensorboard",
    "megatron_lion.integration.register",
    "megatron_lion.lion",
)
for module in MODULES:
    importlib.import_module(module)
if compat.installed_traits().loop_builds_gpt:
    importlib.import_module("megatron.training.models.gpt")
with contextlib.suppress(ImportError):  # not in every Megatron; it brings transformers, the slowest of all
    importlib.import_module("megatron.core.tokenizers.text.libraries")

# Each rank that saves a checkpoint starts a process that holds a queue. Spawned, it would import everything again.
filesystem = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
if hasattr(filesystem, "get_write_results_queue"):
    inspect.unwrap(filesystem.get_write_results_queue).__defaults__ = ("fork",)
else:  # before 0.17 it cannot be told
    fork = multiprocessing.get_context("fork")
    filesystem._get_write_results_queue = functools.cache(lambda: fork.Manager().Queue())
