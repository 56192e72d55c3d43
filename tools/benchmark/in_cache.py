"""The CPU kernel's computation: nanoseconds per element while all data stay in the cache, on one thread.

Memory limits a step on large tensors. This shows how far below that limit the computation is. It repeats well on a
machine that does other work, because the least of many calls is taken. ``--other`` compares with the kernel's sources
in another folder, such as those of an earlier commit; calls of both alternate.

    python -m tools.benchmark.in_cache
    python -m tools.benchmark.in_cache --march haswell                      # as on a CPU without AVX-512
    python -m tools.benchmark.in_cache --other /tmp/before/megatron_lion/kernels
"""

import argparse
import time
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
    sources = [*([args.other / compiler.SOURCE.name] if args.other else []), compiler.SOURCE]
    print(f"{machine()}; -march={args.march or 'native'}; least of {args.samples} calls\n")
    columns = ["other, ns", "ns", "ratio"] if args.other else ["ns"]
    print(f"| storage | {' | '.join(columns)} |\n|---" + "|---" * len(columns) + "|")
    for storage in STORAGES:
        for row_length in args.rows if storage[1] == "int8" else args.rows[:1]:
            tensors = repeated(storage, row_length)
            found = least(tensors, sources, args.samples)
            cells = [f"{nanoseconds:.3f}" for nanoseconds in found]
            cells += [f"{found[1] / found[0]:.2f}"] if args.other else []
            rows = f", rows of {row_length:,}" if len(args.rows) > 1 and storage[1] == "int8" else ""
            print(f"| {name_of(storage)}{rows} | {' | '.join(cells)} |", flush=True)


def repeated(storage: tuple[str, str, str, bool], row_length: int) -> StepTensors:
    """One parameter of ``storage``, ``COPIES`` times."""
    layout = BlockLayout(0, row_length)
    pieces = pieces_of(build(storage, NUMEL), layout)
    blocks = [layout] * COPIES if "scales" in pieces else None
    return StepTensors(**{role: tensors * COPIES for role, tensors in pieces.items()}, blocks=blocks)


def least(tensors: StepTensors, sources: list[Path], samples: int) -> list[float]:
    """Nanoseconds per element with the kernel of each source."""
    kernels = [kernel_of(source) for source in sources]
    times: list[list[float]] = [[] for _ in sources]
    for turn in range(samples // SAMPLES_A_TURN):
        for index in (range(len(sources)), reversed(range(len(sources))))[turn % 2]:

            def repeat(*call: Any, kernel: Any = kernels[index], found: list[float] = times[index]) -> None:
                for _ in range(SAMPLES_A_TURN):
                    start = time.perf_counter_ns()
                    kernel(*call)
                    found.append(time.perf_counter_ns() - start)

            with temporarily(fused, _kernel=lambda *_, repeat=repeat: repeat):
                fused.lion_update_fused_(tensors, SCALARS)
    return [min(found) / (NUMEL * COPIES) for found in times]


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
