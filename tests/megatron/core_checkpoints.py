"""Checkpoints of a loop on ``megatron.core``: resumed on as many and on other ranks, mixed up, damaged.

    torchrun --nproc-per-node 2 tests/megatron/core_checkpoints.py FOLDER           # saves there, and loads in each way
    torchrun --nproc-per-node 1 tests/megatron/core_checkpoints.py FOLDER resume    # loads what two ranks saved

Prints one line for each case: whether the weights after two more steps are those without the save, or the error.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_lion
from tests.megatron import core_loop
from tests.megatron.first_save import SGD, build, stepped

LION: tuple[str, bool, bool, dict[str, Any]] = ("fully_reshardable", True, True, {})
ADAM: tuple[str, bool, bool, dict[str, Any]] = ("fully_reshardable", True, True, {"optimizer": "adam"})
NAME = "iter_0000002"


def save(case: tuple[str, bool, bool, dict[str, Any]], folder: Path) -> tuple[Any, Any]:
    """A model and its optimizer after two steps, saved."""
    args, model, optimizer = build(*case)
    stepped(model, optimizer)
    args.save = folder
    core_loop.save(args, model, optimizer, 2)
    return model, optimizer


def resume(folder: Path, case: tuple[str, bool, bool, dict[str, Any]] = LION) -> str:
    args, model, optimizer = build(*case)
    args.load = folder
    core_loop.load(args, model, optimizer)
    expected = torch.load(folder / "expected.pt")
    same = all(torch.equal(one, other) for one, other in zip(stepped(model, optimizer), expected, strict=True))
    return "same weights" if same else "other weights"


def damaged(folder: Path) -> str:
    """The checkpoint with one byte of the largest file changed."""
    largest = max((folder / NAME).glob("*.distcp"), key=lambda path: path.stat().st_size)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    torch.distributed.barrier()
    return resume(folder)


def outcome(case: Callable[[], str]) -> str:
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", "\\n")


def main() -> None:
    megatron_lion.register()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    cases: dict[str, Callable[[], str]] = {"resumed": lambda: resume(folder)}
    if sys.argv[2:] != ["resume"]:
        weights = stepped(*save(LION, folder))
        if torch.distributed.get_rank() == 0:
            torch.save(weights, folder / "expected.pt")
        torch.distributed.barrier()
        save(ADAM, folder / "adam")
        save(LION, folder / "damaged")
        cases |= {
            "into SGD": lambda: resume(folder, (*LION[:3], SGD)),
            "from Adam": lambda: resume(folder / "adam"),
            "into Adam": lambda: resume(folder, ADAM),
            "damaged": lambda: damaged(folder / "damaged"),
        }
    for name, case in cases.items():
        said = outcome(case)
        if torch.distributed.get_rank() == 0:
            print(f"CASE {name}: {said}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
