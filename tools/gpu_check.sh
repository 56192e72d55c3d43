#!/usr/bin/env bash
# Check this package on a GPU machine, without a network and in at most 8 minutes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [--parts NAME...]

Checks this package on one NVIDIA GPU, without a network: what the machine lacks, the tests of every kernel on the GPU,
the optimizer step's speed next to other optimizers, and short Megatron runs in bf16. Takes at most 8 minutes. Leaves
summary.md, rows.jsonl and log.txt in --out (default: runs/gpu_check). The exit status is 0 only if every part passed.
docs/gpu.md describes the parts.

Needs an NVIDIA driver, a C compiler with Python.h, and a Python from 3.12 on ($PYTHON, default python3) with torch built
for CUDA, Triton, numpy, pytest and megatron-core. Nothing is built, and this package is not installed.

--wheels installs the wheels in FOLDER, without dependencies, into a temporary folder. Make it on a machine with a
network and the same Python and platform:

    pip download -d wheels --no-deps --only-binary :all: megatron-core==0.19.2 packaging pytest pluggy iniconfig pygments \
        flashoptim==0.1.4 bitsandbytes==0.50.2

--parts, which comes last, runs only the named parts.

GPU_CHECK_DEVICE=cpu is a rehearsal: every part with small sizes on the CPU. Its summary says REHEARSAL.
TEXT
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}" OUT="$ROOT/runs/gpu_check" DEVICE="${GPU_CHECK_DEVICE:-cuda}" WHEELS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --wheels) WHEELS=(--wheels "$(cd "${2:?--wheels needs a folder}" && pwd)"); shift 2 ;;
        --out) OUT="$(realpath -m "${2:?--out needs a folder}")"; shift 2 ;;
        --parts) break ;;
        *) echo "gpu_check: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
case "$DEVICE" in
    cuda | cpu) ;;
    *) echo "gpu_check: GPU_CHECK_DEVICE=$DEVICE is unknown; it is cuda (the default) or cpu (a rehearsal)" >&2; exit 2 ;;
esac
if ! found="$("$PYTHON" -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 12))' 2>&1)"; then
    echo "gpu_check: $PYTHON must be Python 3.12 or later, not: $found. Set PYTHON" >&2
    exit 1
fi

cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tools.gpu_check --device "$DEVICE" --out "$OUT" "${WHEELS[@]}" "$@"
