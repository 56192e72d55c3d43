#!/usr/bin/env python3
"""Which parameters ``--optimizer lion`` really trains with Lion, with which betas, and how large the state is on each
rank: stock Megatron and this package, on the same command lines.

    python tools/compare_stock.py                                        # the command lines below, on CPU ranks
    python tools/compare_stock.py --ranks 4 -- --bf16 --optimizer lion   # your own, added to a tiny model's

Each line is started twice with torchrun, once without and once with ``megatron_lion.register()``. Megatron's own loop
builds model and optimizer and trains one step on mock data; then each rank reports its parameters and state. Stock
Megatron's Lion needs the package emerging-optimizers. Where there is no GPU, the ranks run on the CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lion.integration.cpu import run_flags

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("stock", "ours")
LION = "--optimizer lion --lion-beta1 0.9 --lion-beta2 0.95"
LINES = {
    LION: 1,
    f"{LION} --bf16": 2,
    f"{LION} --bf16 --use-distributed-optimizer": 2,
    f"{LION} --bf16 --use-distributed-optimizer --tensor-model-parallel-size 2": 4,
}
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 1 --eval-iters 0 --eval-interval 1000 --lr 1e-4 "
    "--weight-decay 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --num-workers 0"
)


# ---- on a rank ----


def stock_on_cpu() -> None:
    """Stock Megatron without a GPU: only the CPU backend, and no registration."""
    import megatron_lion
    from megatron_lion.integration import compat
    from megatron_lion.integration.cpu import torch_cuda

    if torch_cuda.wanted():
        torch_cuda.replace_cuda()
        from megatron_lion.integration.cpu import megatron_patches

        for patch in (*megatron_patches.CORE, *megatron_patches.TRAINING):
            if patch.seam.is_needed:
                patch.apply()
        gather_unequal_sizes()
    compat.WHEEL_WITHOUT_MAKEFILE.apply()
    megatron_lion.register = lambda: None


def gather_unequal_sizes() -> None:
    """Let gloo gather tensors of unequal sizes, as NCCL does and stock's layer-wise optimizer needs."""
    import torch.distributed as dist

    stock_gather = dist.all_gather

    def all_gather(received: list[Any], sent: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({tensor.numel() for tensor in received}) == 1:
            return stock_gather(received, sent, group=group, async_op=async_op)
        for rank, tensor in enumerate(received):
            if rank == dist.get_rank(group):
                tensor.copy_(sent)
            work = dist.broadcast(tensor, group_src=rank, group=group, async_op=True)
            work.wait()
        return work if async_op else None

    dist.all_gather = all_gather


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Each of Megatron's wrappers around one inner optimizer, however deep they are chained."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        yield optimizer
    else:
        for part in chained:
            yield from parts_of(part)


def owners(model: list[Any], optimizer: Any) -> dict[str, dict[str, Any]]:
    """For each of this rank's parameters: the class of the optimizer that updates it, and its group's settings."""
    from megatron_lion.integration import compat

    names = {param: f"{index}.{name}" for index, chunk in enumerate(model) for name, param in chunk.named_parameters()}
    return {
        names[param]: {
            "optimizer": type(part.optimizer).__name__,
            "wrapper": type(part).__name__,
            "betas": list(group.get("betas", ())),
            "weight_decay": group.get("weight_decay"),
            "elements": param.numel(),
        }
        for part in parts_of(optimizer)
        if part.optimizer is not None
        for param, _, group in compat.updated_params(part)
    }


def state_bytes(optimizer: Any) -> int:
    """Bytes of optimizer state on this rank after a step: master weights that are copies, and every state tensor."""
    total = 0
    for part in parts_of(optimizer):
        if part.optimizer is None:
            continue
        copies = getattr(part, "shard_fp32_from_float16_groups", getattr(part, "fp32_from_float16_groups", []))
        tensors = [copy for group in copies for copy in group if copy is not None]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        total += sum(tensor.nbytes for tensor in tensors if hasattr(tensor, "nbytes"))
    return total


def inspect_one_step(side: str, output: Path) -> None:
    """Train one step as Megatron does, then write down what this rank holds."""
    import megatron_lion

    stock_on_cpu() if side == "stock" else megatron_lion.register()
    import megatron.training.training as training

    train = training.train

    def train_and_inspect(forward_step: Any, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(forward_step, model, optimizer, *args, **kwargs)
        answer = {
            "owners": owners(model, optimizer),
            "trainable": [name for chunk in model for name, param in chunk.named_parameters() if param.requires_grad],
            "state_bytes": state_bytes(optimizer),
        }
        (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(answer))
        return result

    training.train = train_and_inspect
    from launch import pretrain_gpt

    pretrain_gpt.main()


# ---- in the process that starts the ranks ----


def answers(side: str, line: str, ranks: int) -> list[dict[str, Any]] | str:
    """What each rank of a run of ``line`` found, or the error that ended it."""
    on_cpu = os.environ.get("MEGATRON_LION_DEVICE") == "cpu"
    words = [*MODEL.split(), *(run_flags.FLAGS.split() if on_cpu else ()), *line.split()]
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        run = subprocess.run(
            [*launch, __file__, "--inspect", side, folder, "--", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        )
        if run.returncode:
            error = re.search(r"(\w+Error|megatron-lion: error): .*", run.stderr)
            return error[0] if error else f"ended with status {run.returncode}"
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


LIONS = {"Lion", "ShardedLion"}  # class names of stock's and ours


def row(line: str, ranks: int, side: str, found: list[dict[str, Any]] | str) -> str:
    """One row of the table."""
    if isinstance(found, str):
        return f"| `{line}` | {ranks} | {side} | refused: {found} | - | - | - |"
    owned = {name: owner for answer in found for name, owner in answer["owners"].items()}
    lion = {name: owner for name, owner in owned.items() if owner["optimizer"] in LIONS}
    betas = sorted({tuple(owner["betas"]) for owner in lion.values()})
    others = sorted({owner["optimizer"] for owner in owned.values()} - LIONS)
    off = sum(owner["elements"] for name, owner in owned.items() if name not in lion)
    share = off / sum(owner["elements"] for owner in owned.values())
    rest = f"{len(owned) - len(lion)} on {', '.join(others)} ({share:.0%} of the elements)" if others else "none"
    wrappers = ", ".join(sorted({owner["wrapper"] for owner in owned.values()}))
    state = " / ".join(f"{answer['state_bytes']:,}" for answer in found)
    said = " and ".join(str(pair) for pair in betas) or "-"
    return f"| `{line}` | {ranks} | {side} | {len(lion)} of {len(owned)}; {rest} | {said} | {state} | {wrappers} |"


def main() -> None:
    """Inspect on a rank, or compare and print the table."""
    if sys.argv[1:2] == ["--inspect"]:
        _, _, side, folder, _, *flags = sys.argv
        sys.argv = [sys.argv[0], *flags]
        inspect_one_step(side, Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks for your own command line (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="Megatron's flags, after --")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        os.environ["MEGATRON_LION_DEVICE"] = "cpu"
    lines = {" ".join(options.flags): options.ranks} if options.flags else LINES
    print(
        "| flags | ranks | implementation | parameters on Lion; the rest | Lion's betas | state on each rank, bytes "
        "| wrapper |"
    )
    print("|---|---|---|---|---|---|---|")
    for line, ranks in lines.items():
        for side in SIDES:
            print(row(line, ranks, side, answers(side, line, ranks)), flush=True)


if __name__ == "__main__":
    main()
