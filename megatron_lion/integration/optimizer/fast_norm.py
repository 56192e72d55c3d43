"""``--lion-fast-norm``: Megatron's gradient norm on a CPU, in one pass over memory.

Without Transformer Engine and Apex, Megatron calls ``torch.norm`` for each gradient. It sums up in fp32, is slower than
memory, and for bf16 gradients rounds each norm to bf16. Here one call of a compiled kernel sums up the squares of all
of a rank's gradients (:mod:`megatron_lion.kernels.norm_cpu`). Only that call is replaced: which gradients count, and
the sum over ranks, are Megatron's. The norm differs by its error, and so do clipped gradients. Its bits depend neither
on the number of threads nor on the run. Norms of separate groups of parameters, as for multi-token prediction, are
Megatron's own.
"""

import argparse
import contextlib
import math
from typing import Any

import torch

from megatron_lion.config import LionError, LionOptions
from megatron_lion.integration import compat
from megatron_lion.kernels.norm_cpu import norm_cpu_problem, norm_cpu_supports, sum_of_squares_cpu


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flag to Megatron's parser."""
    parser.add_argument(
        "--lion-fast-norm",
        action="store_true",
        help="For gradients on a CPU: compute their norm in one pass over memory. It is more accurate than Megatron's, "
        "so the last bits of clipped gradients may differ. The same bits for any number of threads.",
    )


def check(options: LionOptions, model_chunks: list[Any]) -> None:
    """Raise LionError if the fast norm was asked for and this rank cannot compute it."""
    if not options.fast_norm:
        return
    devices = {str(param.device) for chunk in model_chunks for param in chunk.parameters()} - {"cpu"}
    if devices:
        raise LionError(
            f"--lion-fast-norm is for gradients on a CPU, and this run has some on {', '.join(sorted(devices))}: "
            "remove the flag"
        )
    if problem := norm_cpu_problem():
        raise LionError(f"--lion-fast-norm needs a C++ compiler: {problem}. Install one, or remove the flag")


def used_if_asked(options: LionOptions) -> contextlib.AbstractContextManager[None]:
    """Let Megatron's gradient norm use the kernel if ``options`` ask for it."""
    return compat.gradient_norm_by(_l2_norm) if options.fast_norm else contextlib.nullcontext()


def _l2_norm(grads: list[torch.Tensor]) -> torch.Tensor | None:
    """The 2-norm as one fp32 element; None for gradients that the kernel does not support, such as fp16."""
    if not norm_cpu_supports(grads):
        return None
    return torch.tensor([math.sqrt(sum_of_squares_cpu(grads))], dtype=torch.float32)
