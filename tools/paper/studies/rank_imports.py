"""Imported once by the server that runs are forked from: what every run would otherwise spend ten seconds on."""

# ruff: noqa: F401
import os

from megatron_lion.integration.cpu import torch_cuda

if os.environ.get(torch_cuda.DEVICE_VARIABLE) == "cpu":
    torch_cuda.replace_cuda()

import megatron.training
import megatron.training.argument_utils
import megatron.training.checkpointing
import megatron.training.models.gpt

import megatron_lion.integration.register
import megatron_lion.lion
