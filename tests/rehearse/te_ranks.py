"""Rehearses ranks with Transformer Engine's modules, or with those that replace them: says what they are made of.

    te_ranks.py (te WHEEL | local) < lines of "RANK WORLD_SIZE <Megatron's flags>"

Prints a line of JSON for each line: the parameters as (shape, dtype), sorted; what this package reads of them (kind,
layer, expert, counted on this rank); the sizes, the padding and the messages; the classes of modules
that have parameters. Each rank is forked from this process, which has Megatron imported.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_lion.integration import compat
from megatron_lion.integration.cpu import run_flags, torch_cuda

os.environ.update(run_flags.ENVIRONMENT)
torch_cuda.replace_cuda()
KEPT = ("transformer_impl", "fp8")


def keep_transformer_engine(wheel: Path) -> None:
    """Let a rehearsal build the modules that it replaces otherwise."""
    from tests import transformer_engine as installer

    installer.install(wheel)
    import transformer_engine.pytorch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    stock = TransformerEngineBaseModule.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with compat.temporarily(torch.cuda, is_available=lambda: True):
            stock(self, *args, **kwargs)

    TransformerEngineBaseModule.__init__ = init
    for norm in (transformer_engine.pytorch.LayerNorm, transformer_engine.pytorch.RMSNorm):
        norm.__init__ = functools.partialmethod(marked, norm.__init__)
    from megatron_lion.integration.rehearsal import local_modules

    local_modules.REPLACEMENTS = tuple(each for each in local_modules.REPLACEMENTS if each.dest not in KEPT)
    local_modules.only_te_attention = lambda args: []
    local_modules._keep_down_projections_whole = lambda rank: None


def marked(self: Any, init: Any, *args: Any, **kwargs: Any) -> None:
    """Mark the parameters of a norm as it does where it fills them, which it leaves out on the meta device."""
    init(self, *args, **kwargs)
    if self.sequence_parallel is not None:
        for param in self.parameters():
            param.sequence_parallel = self.sequence_parallel


def describe(line: str) -> dict[str, Any]:
    """What the rank of ``line`` is made of."""
    from megatron_lion.integration.rehearsal import one_rank
    from megatron_lion.integration.reporting import gradient_shards
    from tests.harness import PRETRAIN_GPT

    found: dict[str, Any] = {}
    stock = one_rank._describe

    def note(report: Any, args: Any, model: list[Any], optimizer: Any) -> None:
        stock(report, args, model, optimizer)
        modules = [module for chunk in model for module in chunk.modules()]
        owners = {type(module) for module in modules if next(module.parameters(recurse=False), None) is not None}
        params = [param for chunk in model for param in chunk.parameters()]
        found["parameters"] = sorted([list(param.shape), str(param.dtype)] for param in params)
        found["read"] = sorted(
            [
                list(param.shape), gradient_shards.kind_of(name), layer or 0, gradient_shards.is_expert(param),
                gradient_shards.is_counted(param),
            ]
            for chunk in model
            for name, param, layer in gradient_shards.named_parameters(chunk)
        )  # fmt: skip
        found["modules"] = sorted(f"{owner.__module__.split('.')[0]}.{owner.__name__}" for owner in owners)

    one_rank._describe = note
    rank, world_size, *flags = line.split()
    report = one_rank.rehearse(str(PRETRAIN_GPT), flags, rank=int(rank), world_size=int(world_size))
    padding = sum(bucket["padding"] for bucket in report.buckets)
    return {**found, "sizes": report.sizes, "padding": padding, "traffic": report.traffic}


def main() -> None:
    if sys.argv[1] == "te":
        keep_transformer_engine(Path(sys.argv[2]))
    from megatron_lion.integration.rehearsal import one_rank

    one_rank.preload()
    for line in sys.stdin.read().splitlines():
        sys.stdout.flush()
        if os.fork() == 0:
            answer = describe(line)
            print(f"RANK {json.dumps(answer)}", flush=True)
            os._exit(0)
        if os.wait()[1]:
            sys.exit(f"failed: {line}")


if __name__ == "__main__":
    main()
