"""The CPU kernel's share of the memory limit for every storage, and its speed for rows of any length.

int8 momentum has a scale for every 32 elements of a row, so rows with a length that is not a multiple of 32, 1-D
tensors and shards that begin anywhere have incomplete blocks. The columns on the right compare them with rows of 1,024
elements: 1.00 is as fast. All candidates of a storage update the same tensors in turn, with the caches full of other
memory; the limit is the streaming pass of tools/benchmark/step.py over these tensors.

    python -m tools.benchmark.rows --threads 2
    python -m tools.benchmark.rows --threads 2 --march haswell   # as on a CPU with AVX2 and without AVX-512
    python -m tools.benchmark.rows --threads 1 --numel 1000000 --sets 48 --rounds 150 --statistic minimum
                                                                 # on a machine that does other work too
    python -m tools.benchmark.rows --other /tmp/before/megatron_lion/kernels   # next to an earlier kernel
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lion.integration.compat import temporarily
from megatron_lion.kernels import compiler, fused
from megatron_lion.kernels.fused import lion_update_fused_
from megatron_lion.precision import BlockLayout, quantize, split_master
from megatron_lion.step import StepScalars, StepTensors
from tools.benchmark import measure
from tools.benchmark.shapes import machine
from tools.benchmark.traffic import READ, UPDATE, WRITE, Stream

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Master, momentum, gradient, and whether a bf16 copy of the master is written.
STORAGES = (
    ("fp32", "fp32", "fp32", False),
    ("fp32", "fp32", "fp32", True),
    ("fp32", "bf16", "fp32", True),
    ("fp32", "int8", "fp32", True),
    ("remainder", "fp32", "fp32", False),
    ("remainder", "bf16", "fp32", False),
    ("remainder", "bf16", "bf16", False),
    ("remainder", "int8", "fp32", False),
    ("remainder", "int8", "bf16", False),
)
STATISTICS = {"median": statistics.median, "minimum": min}
SCALARS = StepScalars(lr=1e-6, beta1=0.9, beta2=0.95, weight_decay=0.1)
ALIGNED, SHARD, SHARD_START = "rows of 1,024", "shard from element 7 of rows of 1,000", 7
OTHER = "other sources"


@dataclass
class Row:
    """Times of one storage. ``ratios`` are times of other layouts, and of other sources, over that of aligned rows."""

    storage: str
    bytes_per_parameter: float
    milliseconds: float
    limit_milliseconds: float
    share_of_limit: float
    ratios: dict[str, float]


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    if args.march:
        compiler.FLAGS = (*compiler.FLAGS, f"-march={args.march}")
    compiled = f"-march={args.march or 'native'}"
    print(f"{args.numel:,} elements; {machine()}; {compiled}; {args.statistic} of {args.rounds} rounds\n")
    table = []
    for storage in STORAGES:
        table.append(measured(storage, args))
        print("\n".join(markdown(table)[-1 if len(table) > 1 else 0 :]), flush=True)
    if args.json:
        measure.write_json(args.json, machine=machine(), march=args.march, rows=[asdict(row) for row in table])


def layouts(momentum: str, numel: int) -> dict[str, BlockLayout]:
    """The first is aligned. The last is a shard that begins inside a row, and at an address that is not aligned.

    Only int8 momentum has blocks, so only for it does the length of rows matter.
    """
    rows = {"of 1,000": 1000, "of 1,001": 1001, "1-D": numel} if momentum == "int8" else {}
    between = {name: BlockLayout(0, length) for name, length in rows.items()}
    return {ALIGNED: BlockLayout(0, 1024), **between, SHARD: BlockLayout(SHARD_START, 1000)}


def measured(storage: tuple[str, str, str, bool], args: argparse.Namespace) -> Row:
    """Build the tensors of ``storage``, step them in each layout and stream over them, in turn."""
    sets = [candidates_of(build(storage, args.numel), storage, args) for _ in range(args.sets)]
    turns = [in_turn(same, index / len(sets[0])) for index, same in enumerate(zip(*sets, strict=True))]
    times = measure.measure(turns, args.rounds, evict=args.sets == 1, pick=STATISTICS[args.statistic])
    aligned, milliseconds = sets[0][0], times[ALIGNED]
    limit = min(times[kind + ALIGNED] for kind in measure.PASSES)
    return Row(
        name_of(storage),
        (aligned.bytes or 0) / args.numel,
        milliseconds,
        limit,
        limit / milliseconds,
        {one.name: times[one.name] / milliseconds for one in sets[0][1:] if not one.name.endswith(ALIGNED)},
    )


def candidates_of(
    tensors: dict[str, Tensor], storage: tuple[str, str, str, bool], args: argparse.Namespace
) -> list[measure.Candidate]:
    """Steps of ``tensors`` in each layout, the aligned one first, with other sources, and the limits."""
    made = [candidate(name, tensors, layout) for name, layout in layouts(storage[1], args.numel).items()]
    limits = measure.limits(made[:1])
    if args.other:
        step = functools.partial(_with_kernel, kernel_of(args.other / compiler.SOURCE.name), made[0].step)
        made.append(measure.Candidate(OTHER, "-", step))
    return [*made, *limits]


def in_turn(same: Sequence[measure.Candidate], start: float) -> measure.Candidate:
    """A candidate that takes a step of the next one of ``same`` each time, from the share ``start`` of them on."""
    first = int(start * len(same))
    steps = itertools.cycle([one.step for one in (*same[first:], *same[:first])])
    return measure.Candidate(same[0].name, "-", lambda: next(steps)())


def kernel_of(source: Path) -> Callable[..., None]:
    """The CPU kernel compiled from ``source``."""
    with temporarily(compiler, SOURCE=source):
        return fused._kernel()


def _with_kernel(kernel: Callable[..., None], step: Callable[[], object]) -> None:
    with temporarily(fused, _kernel=lambda *_: kernel):
        step()


def name_of(storage: tuple[str, str, str, bool]) -> str:
    """As in the tables."""
    master, momentum, grad, copies = storage
    return f"{master} master, {momentum} momentum, {grad} gradient{', bf16 copy' if copies else ''}"


def build(storage: tuple[str, str, str, bool], numel: int) -> dict[str, Tensor]:
    """Tensors of one flat parameter, by role of :class:`StepTensors`; those of packed momentum without scales."""
    master, momentum, grad, copies = storage
    values = torch.randn(numel) * 1e-2
    tensors = {"masters": values, "grads": (torch.randn(numel) * 1e-3).to(DTYPES[grad])}
    if master == "remainder":
        tensors["masters"], tensors["remainders"] = split_master(values)
    exp_avg = torch.randn(numel) * 1e-3
    tensors["exp_avgs"] = (
        quantize(exp_avg, BlockLayout(0, numel))[0] if momentum == "int8" else exp_avg.to(DTYPES[momentum])
    )
    if copies:
        tensors["model_copies"] = torch.zeros(numel, dtype=torch.bfloat16)
    return tensors


def candidate(name: str, tensors: dict[str, Tensor], layout: BlockLayout) -> measure.Candidate:
    """A step of ``tensors`` as a piece of a parameter in ``layout``; a shard leaves out their first elements."""
    pieces = pieces_of(tensors, layout)
    step_tensors = StepTensors(**pieces, blocks=[layout] if "scales" in pieces else None)
    modes = {"grads": READ, "model_copies": WRITE}
    streams = [Stream(entries, modes.get(role, UPDATE)) for role, entries in pieces.items()]
    return measure.Candidate(name, "-", functools.partial(lion_update_fused_, step_tensors, SCALARS), passes=[streams])


def pieces_of(tensors: dict[str, Tensor], layout: BlockLayout) -> dict[str, list[Tensor]]:
    """``tensors`` from the layout's first element on, by role of :class:`StepTensors`; packed ones with scales."""
    pieces = {role: [tensor[layout.start :]] for role, tensor in tensors.items()}
    (master,) = pieces["masters"]
    if pieces["exp_avgs"][0].dtype == torch.int8:
        pieces["scales"] = [torch.full((layout.count(master.numel()),), 1e-3, dtype=torch.bfloat16)]
    return pieces


def markdown(table: list[Row]) -> list[str]:
    """Lines of the table."""
    ratios = ["of 1,000", "of 1,001", "1-D", SHARD, *([OTHER] if OTHER in table[0].ratios else [])]
    head = ["storage", "bytes per parameter", f"ms, {ALIGNED}", "limit, ms", "share of it", *ratios]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table:
        numbers = (f"{row.bytes_per_parameter:.1f}", f"{row.milliseconds:.1f}", f"{row.limit_milliseconds:.1f}")
        shown = (f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in ratios)
        lines.append(f"| {' | '.join((row.storage, *numbers, f'{row.share_of_limit:.2f}', *shown))} |")
    return lines


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--numel", type=int, default=31_000_000, help="elements of the parameter (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that are counted (default: %(default)s)")
    parser.add_argument(
        "--sets",
        type=int,
        default=1,
        help="so many sets of tensors in turn, which together are larger than the caches, instead of emptying the "
        "caches between steps (default: %(default)s)",
    )
    parser.add_argument("--march", help="compile the kernel for this instruction set instead of the machine's own")
    parser.add_argument("--other", type=Path, help="a folder with lion_cpu.cpp and its headers, to compare with")
    parser.add_argument(
        "--statistic", choices=tuple(STATISTICS), default="median", help="of the rounds (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    return parser


if __name__ == "__main__":
    main()
