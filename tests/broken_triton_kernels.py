"""Small Triton kernels, each with one fault that tests/test_compiled_for_gpus.py must find in the compiled code.

    python -m tests.broken_triton_kernels FILE

compiles them for one GPU without needing it, and writes what tools/benchmark/sass.py reads of each as JSON. Compile
without ``TRITON_INTERPRET``.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl

from tools.benchmark.sass import compile_kernel, facts

ARCH, SIZE, THREADS = 80, 1024, 128


@triton.jit
def intact_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(x + index, tl.load(x + index) * 0.9 + tl.load(y + index))


@triton.jit
def loads_after_a_store_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(x + index, tl.load(x + index) * 0.9)
    tl.store(y + index, tl.load(x + (SIZE - 1 - index)))


@triton.jit
def narrow_kernel(x, y, SIZE: tl.constexpr):
    index = 3 * tl.arange(0, SIZE)
    tl.store(x + index, tl.load(x + index) * 0.9 + tl.load(y + index))


@triton.jit
def long_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value, other = tl.load(x + index), tl.load(y + index)
    for _ in tl.static_range(40):
        value = value * 0.9 + other
    tl.store(x + index, value)


@triton.jit
def spilling_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.load(x + index)
    total = tl.cumsum(value, 0)
    for step in range(4):
        total = total + tl.load(y + index + step * SIZE) * value
    tl.store(x + index, total)


@triton.jit
def flushing_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.inline_asm_elementwise(
        "mul.ftz.f32 $0, $1, $2;", "=r,r,r", [tl.load(x + index), tl.load(y + index)], tl.float32, True, 1
    )
    tl.store(x + index, value)


# Kernel, elements of its only program, and options of the compiler.
KERNELS: dict[str, tuple[Callable[..., Any], int, dict[str, Any]]] = {
    "intact": (intact_kernel, SIZE, {}),
    "loads after a store": (loads_after_a_store_kernel, SIZE, {}),
    "contracts": (intact_kernel, SIZE, {"enable_fp_fusion": True}),
    "narrow accesses": (narrow_kernel, SIZE, {}),
    "many instructions": (long_kernel, SIZE, {}),
    "spills": (spilling_kernel, 8 * SIZE, {"maxnreg": 24}),
    "flushes denormals": (flushing_kernel, SIZE, {}),
}


def main() -> None:
    """Compile and read all of them."""
    rows = []
    for name, (kernel, size, options) in KERNELS.items():
        compiled = compile_kernel(kernel, {"x": "*fp32", "y": "*fp32"}, {"SIZE": size}, {"x", "y"}, ARCH, **options)
        found = facts(compiled)
        wide = 3 * (size // THREADS) // 4
        rows.append({"name": name, "arch": ARCH, "wide": wide, "executed": found.executed / (size // THREADS)})
        rows[-1]["facts"] = asdict(found)
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
