#!/usr/bin/env bash
# usage: launch/demo.sh [--iterations N]
#
# From a fresh clone, without a GPU: make the environment, prepare text from Python's documentation, and pretrain a tiny
# GPT in Megatron's own loop, with Lion (killed and resumed once) and with SGD. Writes figures, a table and norm ratios to
# runs/demo/.
set -euo pipefail

case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/environment.sh"

make_environment "$ROOT"
made=$SECONDS
"$PYTHON" "$ROOT/launch/demo.py" --output "$ROOT/runs/demo" "$@"
say "$((SECONDS - made)) s, after $made s for the environment"
