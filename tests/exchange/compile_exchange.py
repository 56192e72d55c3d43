"""Compile the Triton kernels of the exchange for GPUs that are absent, and print what came out as JSON.

    python compile_exchange.py [--arch 80 90 100] [--formats 0 1 2 3] [--kernels replay_kernel]

Run without TRITON_INTERPRET. No driver is needed: this is triton.compile with a GPUTarget, as in Triton's own tests.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lion.exchange.digits import FORMATS
from megatron_lion.kernels import exchange_gpu, exchange_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "digits_kernel": {"old": "*P", "new": "*P", "sign": "*i8", "out": "*u8"},
    "pack_kernel": {"digits": "*u8", "params": "*P", "signs": "*u8", "residuals": "*u8", "checksum": "*i64"},
    "count_kernel": {"digits": "*u8", "counts": "*i64"},
    "table_kernel": {
        "digits": "*u8",
        "params": "*P",
        "counts": "*i64",
        "ends": "*i64",
        "offsets": "*i16",
        "values": "*i16",
    },
    "replay_kernel": {
        "params": "*P",
        "messages": "*u8",
        "segments": "*i64",
        "program_segment": "*i32",
        "program_group": "*i64",
        "rates": "*fp32",
        "valid": "*i32",
        "checksums": "*i64",
    },
    "replace_kernel": {
        "params": "*P",
        "messages": "*i16",
        "counts": "*i64",
        "ends": "*i64",
        "valid": "*i32",
        "checksums": "*i64",
    },
}
SIZES = {"SIZE": exchange_gpu.SIZE, "GROUPS": exchange_gpu.GROUPS}
EVERY_FORMAT = ("digits_kernel", "pack_kernel", "replay_kernel")


def compiled(name, kind, arch):
    """The kernel ``name`` for parameters of format ``kind``, as the launches make it."""
    kernel = getattr(exchange_triton, name)
    params = "*fp32" if FORMATS[kind][0].itemsize == 4 else "*i16"
    constants = {key: value for key, value in {**SIZES, "FORMAT": kind}.items() if key in kernel.arg_names}
    if name == "replace_kernel":
        constants["SIZE"] = exchange_gpu.ENTRIES
    signature, aligned = {}, []
    for position, arg in enumerate(kernel.arg_names):
        pointer = POINTERS[name].get(arg)
        scalar = "fp32" if arg in ("lr", "weight_decay") else "i64"
        signature[arg] = "constexpr" if arg in constants else (pointer or scalar).replace("*P", params)
        if pointer or arg in ("count", "numel", "message_bytes", "signs_at", "residuals_at"):
            aligned.append(position)
    attrs = {(position,): [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})


def facts(program):
    """Registers, spills, and contractions of a product and a sum."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        run = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout + run.stderr))
    ptx = program.asm["ptx"]
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["LOCAL"]),
        "fma": len(re.findall(r"\bfma\.rn", ptx)),
        "ftz": len(re.findall(r"\.ftz", ptx)),
        "vector_accesses": len(re.findall(r"(?:ld|st)\.global\S*\.v[248]\.", ptx)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--formats", nargs="*", type=int, default=list(range(len(FORMATS))), help="numbers in FORMATS")
    parser.add_argument("--kernels", nargs="*", default=list(POINTERS), choices=POINTERS)
    args = parser.parse_args()
    rows = []
    for name in args.kernels:
        for kind in args.formats if name in EVERY_FORMAT else [1]:
            rows += [
                {"kernel": name, "format": kind, "arch": arch, **facts(compiled(name, kind, arch))}
                for arch in args.arch
            ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
