#!/usr/bin/env bash
# usage: launch/demo.sh [--iterations N]
#
# From a fresh clone, with no GPU: make the environment, prepare text that every machine has, pretrain a tiny GPT through
# Megatron's own loop with Lion (killed and resumed once) and with SGD, measuring the norm ratio on the way, and leave
# figures and a table in runs/demo/.
set -euo pipefail

case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUTPUT="$ROOT/runs/demo"
source "$ROOT/launch/environment.sh"

make_environment "$ROOT"

say "text: the documentation that ships with Python"
"$PYTHON" "$ROOT/tools/demo_text.py" --output "$OUTPUT/text"

say "training: a tiny GPT on 4 gloo ranks, TP 2 x DP 2, distributed optimizer"
"$PYTHON" "$ROOT/launch/demo.py" --text "$OUTPUT/text" --output "$OUTPUT" "$@"

say "figures"
"$PYTHON" "$ROOT/tools/compare_runs.py" --run "Lion=$OUTPUT/lion/log.txt" --run "SGD=$OUTPUT/sgd/log.txt" \
    --figure "$OUTPUT/loss.png" --table "$OUTPUT/table.md"
"$PYTHON" "$ROOT/tools/norm_ratio_figure.py" --run "Lion=$OUTPUT/lion/norm_ratio.jsonl" \
    --run "SGD=$OUTPUT/sgd/norm_ratio.jsonl" --figure "$OUTPUT/norm_ratio.png"
