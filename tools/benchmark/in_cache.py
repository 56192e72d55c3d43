"""The CPU kernel's computation: nanoseconds per element while all data stay in the cache, on one thread.

Memory limits a step on large tensors. This shows how far below that limit the computation is. It repeats well on a
machine that does other work, because the least of many calls is taken. ``--other`` compares with the kernel's sources
in another folder, such as those of an earlier commit; calls of both alternate.

    python -m tools.benchmark.in_cache
    python -m tools.benchmark.in_cache --march haswell                      # as on a CPU without AVX-512
    python -m tools.benchmark.in_cache --other /tmp/before/megatron_lion/kernels
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lion.integration.compat import temporarily
from megatron_lion.kernels import compiler, fused
from megatron_lion.precision import BlockLayout
from megatron_lion.step import StepTensors
from tools.benchmark.rows import SCALARS, STORAGES, build, kernel_of, name_of, pieces_of
from tools.benchmark.shapes import machine

NUMEL = 16_384  # 20 bytes each: the second level of any server's cache has room for them
COPIES = 16  # the same tensors so many times in one call, so that the call itself does not count
SAMPLES_A_TURN = 20


def main() -> None:
    """Measure and print a table."""
    args = arguments().parse_args()
    torch.set_num_threads(1)
    if args.march:
        compiler.FLAGS = (*compiler.FLAGS, f"-march={args.march}")
    folders = [args.other, compiler.SOURCE.parent] if args.other else [compiler.SOURCE.parent]
    kernels = [kernel_of(folder / compiler.SOURCE.name) for folder in folders]
    problems = {}
    for storage in STORAGES:
        for row_length in args.rows if storage[1] == "int8" else args.rows[:1]:
            rows = f", rows of {row_length:,}" if len(args.rows) > 1 and storage[1] == "int8" else ""
            problems[name_of(storage) + rows] = repeated(storage, row_length)
    least = dict.fromkeys(itertools.product(problems, range(len(kernels))), float("inf"))
    for _ in range(args.samples // SAMPLES_A_TURN):  # in turn, so that a slow moment does not fall on one row
        for (name, index), before in least.items():
            least[name, index] = min(before, nanoseconds(problems[name], kernels[index]))
    print(f"{machine()}; -march={args.march or 'native'}; least of {args.samples} calls\n")
    columns = ["other, ns", "ns", "ratio"] if args.other else ["ns"]
    print(f"| storage | {' | '.join(columns)} |\n|---" + "|---" * len(columns) + "|")
    for name in problems:
        found = [least[name, index] for index in range(len(kernels))]
        cells = [f"{each:.3f}" for each in found] + ([f"{found[1] / found[0]:.2f}"] if args.other else [])
        print(f"| {name} | {' | '.join(cells)} |")


def repeated(storage: tuple[str, str, str, bool], row_length: int) -> StepTensors:
    """One parameter of ``storage``, ``COPIES`` times."""
    layout = BlockLayout(0, row_length)
    pieces = pieces_of(build(storage, NUMEL), layout)
    blocks = [layout] * COPIES if "scales" in pieces else None
    return StepTensors(**{role: tensors * COPIES for role, tensors in pieces.items()}, blocks=blocks)


def nanoseconds(tensors: StepTensors, kernel: Callable[..., None]) -> float:
    """Per element, of the fastest of some calls."""
    times = []

    def repeat(*call: Any) -> None:
        for _ in range(SAMPLES_A_TURN):
            start = time.perf_counter_ns()
            kernel(*call)
            times.append(time.perf_counter_ns() - start)

    with temporarily(fused, _kernel=lambda *_: repeat):
        fused.lion_update_fused_(tensors, SCALARS)
    return min(times) / (NUMEL * COPIES)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--march", help="compile the kernel for this instruction set instead of the machine's own")
    parser.add_argument("--other", type=Path, help="a folder with lion_cpu.cpp and its headers, to compare with")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024], help="row lengths with int8 (default: 1024)")
    parser.add_argument("--samples", type=int, default=1000, help="calls per storage (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
