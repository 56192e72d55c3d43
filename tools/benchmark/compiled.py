"""The Triton kernel compiled for GPUs that are absent: a table of what the machine code has.

    python -m tools.benchmark.compiled [--variants all] [--archs 80 90 100] [--json FILE]

Estimates, not measurements: "executed" counts the instructions of a thread in a full block, divided by its elements.
"Issue" is the share of the issue slots that a GPU needs for them while its memory is read and written at full speed.
Near 100 % and above, the instructions limit the speed and not the memory.
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

from megatron_lion.kernels.triton_lion import MAY_BE_ON_DEVICE, compile_time, compiler_options
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
# What Megatron's flags make, telemetry, and tails.
USUAL = (
    "fp32/fp32/fp32", "fp32/fp32/fp32+copy", "bf16/bf16/bf16", "fp32/fp32/bf16+copy", "fp32/fp32/int8+copy",
    "remainder/fp32/fp32", "remainder/fp32/bf16", "remainder/bf16/bf16", "remainder/fp32/int8", "remainder/bf16/int8",
    "fp32/fp32/fp32+telemetry", "remainder/bf16/int8+telemetry", "fp32/fp32/fp32+digits", "fp32/fp32/fp32+copy+digits",
    "remainder/bf16/int8+digits", "fp32/fp32/fp32+copy+rest", "remainder/bf16/int8+rest",
)  # fmt: skip
# Instructions per second and bytes per second: SMs x 128 lanes x clock, memory bandwidth.
GPUS = {"A100-80": (80, 108 * 128 * 1.41e9, 2.039e12), "H100": (90, 132 * 128 * 1.755e9, 3.35e12)}


@dataclass(frozen=True)
class Variant:
    """One launch: master/gradient/momentum, +copy, +telemetry, +digits, +scalars on the device, and +rest for tails."""

    master: str
    grad: str
    momentum: str
    copy: bool = False
    telemetry: bool = False
    digits: bool = False
    scalars: bool = False
    rest: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        words = (word for word in ("copy", "telemetry", "digits", "scalars", "rest") if getattr(self, word))
        return "+".join([f"{self.master}/{self.grad}/{self.momentum}", *words])

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
        codes = 2 + 4 / 32 if self.kind.scales else 0.0
        return self.wide_bytes + codes + self.digits

    @property
    def wide_bytes(self) -> int:
        """Those in 128-bit accesses: all except int8 codes and digits (64 bits for each thread) and scales."""
        kind = self.kind
        twice = [
            kind.masters,
            *([kind.remainders] if kind.remainders else []),
            *([] if kind.scales else [kind.exp_avgs]),
        ]
        return 2 * sum(dtype.itemsize for dtype in twice) + kind.grads.itemsize + 2 * self.copy


def variants() -> Iterator[Variant]:
    """All variants of the kernel, those with scalars on the device only without telemetry and digits, and those with
    digits only where the copies are of fp32 masters, as in training."""
    choices = itertools.product(
        ("fp32", "bf16", "remainder"),
        ("fp32", "bf16"),
        DTYPES,
        *[(False, True)] * 5,  # copy, telemetry, digits, scalars, rest
    )
    for variant in itertools.starmap(Variant, choices):
        no_model = variant.copy and variant.master != "fp32"
        if not (variant.scalars and (variant.telemetry or variant.digits)) and not (variant.digits and no_model):
            yield variant


@dataclass(frozen=True)
class Row:
    """One variant on one architecture."""

    name: str
    arch: int
    bytes: float
    executed: float
    """Instructions per element."""
    wide: int
    """128-bit accesses of a thread if all that can be are."""
    facts: Facts


def row(variant: Variant, arch: int) -> Row:
    """Compile ``variant`` for ``arch`` and read it."""
    constants = {
        **compile_time(variant.kind),
        "TELEMETRY": variant.telemetry,
        "DIGITS": variant.digits,
        "ON_DEVICE": 7 if variant.scalars else 0,
        "WHOLE": not variant.rest,
        "SIZE": SIZE,
    }
    types = TYPES | (dict.fromkeys(MAY_BE_ON_DEVICE, "*fp32") if variant.scalars else {})
    aligned = {"table", "tensor_of", "sums"}
    is_plain = not (variant.rest or variant.telemetry or variant.digits or variant.scalars)
    options = compiler_options(is_plain=is_plain)
    found = facts(compile_kernel(lion_kernel, types, constants, aligned, arch, **options))
    elements = SIZE // THREADS
    wide = elements * variant.wide_bytes // 16
    return Row(variant.name, arch, variant.bytes, found.executed / elements, wide, found)


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
    gpus = [gpu for gpu, (arch, _, _) in GPUS.items() if arch in archs]
    titles = ["variant", "bytes", *(f"sm_{arch}" for arch in archs), "accesses", *(f"issue, {gpu}" for gpu in gpus)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    found = {(one.name, one.arch): one for one in table}
    for name in dict.fromkeys(one.name for one in table):
        here = [found[name, arch] for arch in archs]
        columns = [f"{one.facts.registers}, {one.facts.spills}, {one.facts.fma}, {one.executed:.1f}" for one in here]
        widths = ", ".join(f"{count} x {bits}" for bits, count in sorted(here[0].facts.widths.items(), reverse=True))
        shares = [_issue(found[name, GPUS[gpu][0]], *GPUS[gpu][1:]) for gpu in gpus]
        lines.append(f"| {' | '.join([name, f'{here[0].bytes:.3g}', *columns, widths, *shares])} |")
    return "\n".join(lines)


def _issue(one: Row, slots: float, bandwidth: float) -> str:
    return f"{bandwidth / one.bytes * one.executed / slots:.0%}"


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(USUAL),
        metavar="NAME",
        help=f"as in the table, or all (default: {' '.join(USUAL)})",
    )
    parser.add_argument(
        "--archs",
        nargs="+",
        type=int,
        default=list(ARCHITECTURES),
        help=f"such as 90 for an H100 (default: {' '.join(map(str, ARCHITECTURES))})",
    )
    parser.add_argument("--processes", type=int, default=1, help="compile in so many processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    known = {variant.name: variant for variant in variants()}
    names = list(known) if args.variants == ["all"] else args.variants
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown variants: {', '.join(unknown)}. Valid: {', '.join(known)}")
    table = rows([known[name] for name in names], args.archs, args.processes)
    print(f"Triton {triton.__version__}: {len(table)} compilations\n\n{markdown(table)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in table], indent=1))


if __name__ == "__main__":
    main()
