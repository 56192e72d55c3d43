"""Compile the Triton kernels of the exchange for GPUs that are absent, and print what came out as JSON.

    python compile_exchange.py [--arch 80 90 100] [--formats 0 1 2 3] [--kernels replay_kernel] [--bits 32 64]

Run without TRITON_INTERPRET. No driver is needed: this is triton.compile with a GPUTarget, as in Triton's own tests.
"""

import argparse
import json
from dataclasses import asdict

from megatron_lion.exchange.digits import FORMATS
from megatron_lion.kernels import exchange_gpu, exchange_triton, reduce_gpu, reduce_triton
from tools.benchmark.sass import ARCHITECTURES, compile_kernel, facts

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
    "write_kernel": {
        "gradient": "*P",
        "scales": "*i16",
        "packed": "*i8",
        "residual": "*i8",
        "residual_scales": "*i16",
    },
    "sum_kernel": {"own": "*P", "messages": "*i8", "total": "*fp32"},
}
SIZES = {"SIZE": exchange_gpu.SIZE, "GROUPS": exchange_gpu.GROUPS}
EVERY_FORMAT = ("digits_kernel", "pack_kernel", "replay_kernel")
OF_REDUCE = ("write_kernel", "sum_kernel")  # of int4 with int8 error feedback, and of ternary without


def compiled(name, kind, arch, bits):
    """The kernel ``name`` for parameters or gradients of format ``kind``, as the launches make it.

    Triton gives an integer argument 32 ``bits``, or 64 where its value needs them.
    """
    kernel = getattr(reduce_triton if name in OF_REDUCE else exchange_triton, name)
    params = "*fp32" if FORMATS[kind][0].itemsize == 4 else "*i16"
    reduced = {"CODE": 2, "FEEDBACK": 0, "ROWS": 5} if kind else {"CODE": 1, "FEEDBACK": 1, "ROWS": 1}
    all_constants = {**SIZES, **reduced, "TILE": reduce_gpu.TILE, "FORMAT": kind}
    constants = {key: value for key, value in all_constants.items() if key in kernel.arg_names}
    if name == "replace_kernel":
        constants["SIZE"] = exchange_gpu.ENTRIES
    types = {arg: ("fp32" if arg in ("lr", "weight_decay") else f"i{bits}") for arg in kernel.arg_names}
    types |= {arg: pointer.replace("*P", params) for arg, pointer in POINTERS[name].items()}
    types = {arg: type_ for arg, type_ in types.items() if arg not in constants}
    counts = {"count", "numel", "shard_numel", "start", "message_bytes", "signs_at", "residuals_at"}
    aligned = {*POINTERS[name], *counts}
    return compile_kernel(kernel, types, constants, aligned, arch)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--formats", nargs="*", type=int, default=list(range(len(FORMATS))), help="numbers in FORMATS")
    parser.add_argument("--kernels", nargs="*", default=list(POINTERS), choices=POINTERS)
    parser.add_argument("--bits", nargs="*", type=int, default=[32], help="of integer arguments")
    args = parser.parse_args()
    rows = []
    for name in args.kernels:
        for kind in args.formats if name in EVERY_FORMAT else [0, 1] if name in OF_REDUCE else [1]:
            rows += [
                {"kernel": name, "format": kind, "arch": arch, "bits": bits}
                | asdict(facts(compiled(name, kind, arch, bits)))
                for arch in args.arch
                for bits in args.bits
            ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
