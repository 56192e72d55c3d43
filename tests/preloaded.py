"""Imported once by the server that ranks are forked from: what every run would spend ten seconds of each rank on.

Megatron as it is on a machine without a GPU, with nothing of this package registered: that is each run's own first act.
"""

# ruff: noqa: F401
import inspect
import os

from megatron_lion.integration import cpu_backend

if os.environ.get(cpu_backend.DEVICE_VARIABLE) == "cpu":
    cpu_backend.replace_cuda()

import megatron.training
import megatron.training.argument_utils
import megatron.training.checkpointing
import megatron.training.models.gpt
import torch.utils.tensorboard
from megatron.core.dist_checkpointing.strategies import filesystem_async

import megatron_lion.integration.register
import megatron_lion.lion

# Each rank that saves a checkpoint starts a process that holds a queue. Spawned, it would import everything again.
inspect.unwrap(filesystem_async.get_write_results_queue).__defaults__ = ("fork",)
