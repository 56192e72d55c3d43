"""The Triton kernel compiled for GPUs that are absent: a table of what the machine code has.

    python -m tools.benchmark.compiled [--variants all] [--archs 80 90 100] [--json FILE]

Estimates, not measurements: "executed" counts the instructions of a thread in a full block, divided by its elements.
"Issue" is the share of the issue slots that a GPU needs for them while its memory is read and written at full speed; near
100 % and above, the instructions limit the speed and not the memory.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from megatron_lion.kernels.triton_lion import compile_time
from megatron_lion.kernels.triton_lion_kernel import SIZE, lion_kernel
from megatron_lion.step import StepKind
from tools.benchmark.sass import ARCHITECTURES, Facts, compile_kernel, facts

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16, "int8": torch.int8}
THREADS = 128  # of a program: four warps, Triton's default
TYPES = {
    "table": "*i64",
    "tensor_of": "*i32",
    **dict.fromkeys(("lr", "beta1", "rest1", "beta2", "rest2", "weight_decay", "grad_scale"), "fp32"),
    "skip": "*i32",
    "sums": "*fp64",
}
# What Megatron's flags make, and telemetry.
USUAL = (
    "fp32/fp32/fp32", "fp32/fp32/fp32+copy", "bf16/bf16/bf16", "fp32/fp32/bf16+copy", "fp32/fp32/int8+copy",
    "remainder/fp32/fp32", "remainder/fp32/bf16", "remainder/bf16/bf16", "remainder/fp32/int8", "remainder/bf16/int8",
    "fp32/fp32/fp32+telemetry", "remainder/bf16/int8+telemetry",
)  # fmt: skip
# Instructions per second and bytes per second: SMs x 128 lanes x clock, memory bandwidth.
GPUS = {"A100-80": (80, 108 * 128 * 1.41e9, 2.039e12), "H100": (90, 132 * 128 * 1.755e9, 3.35e12)}


@dataclass(frozen=True)
class Variant:
    """Storage of one launch: master/gradient/momentum, with +copy, +telemetry and, for tails, +rest."""

    master: str
    grad: str
    momentum: str
    copy: bool = False
    telemetry: bool = False
    whole: bool = True

    @property
    def name(self) -> str:
        """As in the table."""
        words = ("copy", self.copy), ("telemetry", self.telemetry), ("rest", not self.whole)
        return "+".join([f"{self.master}/{self.grad}/{self.momentum}", *(word for word, is_so in words if is_so)])

    @property
    def kind(self) -> StepKind:
        """The dtypes of its tensors."""
        return StepKind(
            torch.device("cuda"),
            DTYPES.get(self.master, BF16),
            DTYPES[self.grad],
            DTYPES[self.momentum],
            model_copies=BF16 if self.copy else None,
            remainders=torch.int16 if self.master == "remainder" else None,
            scales=BF16 if self.momentum == "int8" else None,
        )

    @property
    def bytes(self) -> float:
        """Bytes that a step reads and writes per element."""
        kind = self.kind
        twice = [kind.masters, kind.exp_avgs, *([kind.remainders] if kind.remainders else [])]
        scales = 4 / 32 if kind.scales else 0.0
        return 2 * sum(dtype.itemsize for dtype in twice) + kind.grads.itemsize + 2 * self.copy + scales


def variants() -> Iterator[Variant]:
    """All variants of the kernel, without the combinations of scalars on the device."""
    yield from itertools.starmap(
        Variant,
        itertools.product(
            ("fp32", "bf16", "remainder"), ("fp32", "bf16"), DTYPES, (False, True), (False, True), (True, False)
        ),
    )


@dataclass(frozen=True)
class Row:
    """One variant on one architecture."""

    name: str
    arch: int
    bytes: float
    facts: Facts

    @property
    def executed(self) -> float:
        """Instructions per element."""
        return self.facts.executed / (SIZE / THREADS)


def row(variant: Variant, arch: int) -> Row:
    """Compile ``variant`` for ``arch`` and read it."""
    constants = {
        **compile_time(variant.kind),
        "TELEMETRY": variant.telemetry,
        "ON_DEVICE": 0,
        "WHOLE": variant.whole,
        "SIZE": SIZE,
    }
    aligned = {"table", "tensor_of", "sums"}
    return Row(variant.name, arch, variant.bytes, facts(compile_kernel(lion_kernel, TYPES, constants, aligned, arch)))


def rows(chosen: Iterable[Variant], archs: Iterable[int], processes: int = 1) -> list[Row]:
    """Every variant on every architecture."""
    pairs = list(itertools.product(chosen, archs))
    if processes == 1:
        return list(itertools.starmap(row, pairs))
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(row, *zip(*pairs, strict=True)))


def markdown(table: list[Row]) -> str:
    """One line per variant, with a column per architecture."""
    archs = sorted({one.arch for one in table})
    names = [gpu for gpu, (arch, _, _) in GPUS.items() if arch in archs]
    cells = [f"sm_{arch}: registers, spills, fma, executed" for arch in archs]
    lines = [
        "| "
        + " | ".join(["variant", "bytes", *cells, "accesses, bits: number", *(f"issue, {n}" for n in names)])
        + " |",
        "|---" * (3 + len(archs) + len(names)) + "|",
    ]
    by_variant = {(one.name, one.arch): one for one in table}
    for name in dict.fromkeys(one.name for one in table):
        here = [by_variant[name, arch] for arch in archs]
        columns = [
            f"{one.facts.registers}, {one.facts.spills}, {one.facts.contracted}, {one.executed:.1f}" for one in here
        ]
        widths = ", ".join(f"{bits}: {count}" for bits, count in sorted(here[-1].facts.widths.items(), reverse=True))
        shares = []
        for gpu in names:
            arch, slots, bandwidth = GPUS[gpu]
            one = by_variant[name, arch]
            shares.append(f"{bandwidth / one.bytes * one.executed / slots:.0%}")
        lines.append("| " + " | ".join([name, f"{here[0].bytes:.3g}", *columns, widths, *shares]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", default=list(USUAL), metavar="NAME", help="'all', or names as in the table"
    )
    parser.add_argument(
        "--archs", nargs="+", type=int, default=list(ARCHITECTURES), help="compute capabilities (%(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="compile in so many processes (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    known = {variant.name: variant for variant in variants()}
    if args.variants == ["all"]:
        args.variants = list(known)
    if unknown := set(args.variants) - known.keys():
        parser.error(f"unknown variants {sorted(unknown)}; valid: {', '.join(known)}")
    table = rows([known[name] for name in args.variants], args.archs, args.processes)
    print(f"Triton {triton.__version__}, torch {torch.__version__}: {len(table)} compilations\n\n{markdown(table)}")
    if args.json:
        args.json.write_text(json.dumps([{**asdict(one), "executed": one.executed} for one in table], indent=1))


if __name__ == "__main__":
    main()
