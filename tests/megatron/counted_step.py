"""Run under torchrun in the place of ``pretrain_gpt.py``: counts in each step what would wait for a GPU.

WHAT is ``number``, or ``tensor`` for a gradient norm that stays on the device, as with Transformer Engine or Apex.
Every rank leaves in PROBE_OUTPUT the counts of each step, and the kinds of its updates as expected at the start and
as they were.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_lion

megatron_lion.register()

from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from launch import pretrain_gpt  # noqa: E402
from megatron_lion import kernels  # noqa: E402
from megatron_lion.integration.optimizer import startup_report  # noqa: E402
from megatron_lion.integration.optimizer.chained import LionChainedOptimizer  # noqa: E402

ANSWER: dict[str, Any] = {"waits": [], "of the norm": [], "copies from the host": [], "expected": [], "kinds": []}


class Waits(TorchDispatchMode):
    """Counts reads of a tensor on the host, and tensors made of numbers on the host, which CUDA waits for as well."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.copies += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def count_waits() -> None:
    """Count those of each step, and apart those of Megatron's own norm."""
    step, norm, tolist = LionChainedOptimizer.step, ChainedOptimizer.get_grad_norm, torch.Tensor.tolist
    running: list[Waits] = []

    def counted_step(self: Any) -> Any:
        with Waits() as waits:
            running.append(waits)
            result = step(self)
            running.clear()
        ANSWER["waits"].append(waits.reads - ANSWER["of the norm"][-1])
        ANSWER["copies from the host"].append(waits.copies)
        return result

    def counted_norm(self: Any) -> Any:
        before, copies = running[0].reads, running[0].copies
        result = norm(self)
        ANSWER["of the norm"].append(running[0].reads - before)
        running[0].copies = copies
        return result

    def counted_tolist(self: torch.Tensor) -> Any:
        for waits in running:
            waits.reads += 1  # on a CPU nothing is dispatched
        return tolist(self)

    LionChainedOptimizer.step, ChainedOptimizer.get_grad_norm = counted_step, counted_norm  # type: ignore[method-assign]
    torch.Tensor.tolist = counted_tolist  # type: ignore[method-assign, assignment]


def keep_the_norm_on_the_device() -> None:
    """Stand-ins for Transformer Engine's two functions, with which Megatron's norm is a tensor."""

    def norm(chunk: int, overflow: Any, lists: Any, per_tensor: bool) -> Any:
        return torch.stack(torch._foreach_norm(lists[0])).norm().reshape(1), None

    def scale(*args: Any) -> None:
        raise AssertionError("Lion applies the factor")

    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = norm, scale


def record_kinds() -> None:
    describe, choose = kernels.describe, kernels.choose

    def described(kernel: str, kinds: Any) -> str:
        ANSWER["expected"] = sorted(map(str, kinds))
        return describe(kernel, kinds)

    def chosen(kernel: str, kind: Any, *, digits: bool = False) -> Any:
        if str(kind) not in ANSWER["kinds"]:
            ANSWER["kinds"].append(str(kind))
        return choose(kernel, kind, digits=digits)

    startup_report.kernels.describe, kernels.choose = described, chosen  # type: ignore[attr-defined]


def main() -> None:
    if sys.argv.pop(1) == "tensor":
        keep_the_norm_on_the_device()
    count_waits()
    record_kinds()
    pretrain_gpt.main()
    ANSWER["kinds"].sort()
    Path(os.environ["PROBE_OUTPUT"], f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(ANSWER))


if __name__ == "__main__":
    main()
