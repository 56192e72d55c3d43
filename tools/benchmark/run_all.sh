#!/usr/bin/env bash
# usage: tools/benchmark/run_all.sh [OUT]
#
# Every table of docs/results/benchmarks.md in one command, on a machine that does nothing else, into OUT/benchmarks.md.
# PYTHON names the interpreter; THREADS the threads of a step (default 2). Peers: see python -m tools.benchmark.step --help.
set -euo pipefail

case "${1:-}" in --help | -h) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}" THREADS="${THREADS:-2}" OUT="${1:-$ROOT/runs/benchmarks}"
mkdir -p "$OUT"
cd "$ROOT"
phase=("$PYTHON" -m tools.benchmark.phase)
{
    printf '## Only the update\n\n'
    "$PYTHON" -m tools.benchmark.step --peers all --threads "$THREADS" --rounds 9 --json "$OUT/step.json" --plot "$OUT/step.svg"
    printf '\n## Rows of any length\n\n'
    "$PYTHON" -m tools.benchmark.rows --threads "$THREADS" --rounds 9 --json "$OUT/rows.json"
    printf '\n## The whole optimizer phase in Megatron\n\n'
    "${phase[@]}" --threads "$THREADS" --rounds 7 --json "$OUT/phase.json"
    printf '\n## Only the host\n\n'
    "${phase[@]}" --host --threads 1 --rounds 30 --json "$OUT/host.json"
    printf '\n## Over data-parallel ranks\n\n'
    "${phase[@]}" --ranks 1 2 4 --threads 1 --rounds 5 --peers adam-fused lion
} 2>"$OUT/benchmark.log" | tee "$OUT/benchmarks.md"
