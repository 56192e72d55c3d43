#!/usr/bin/env bash
# Run every test there is, the slow ones as well, and write the tables of docs/tests.md and the README. Arguments go to
# pytest; a part (-k, -m, a file) writes no table: give the XML files of all parts to tools/test_table.py.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/environment.sh"
make_environment "$ROOT"
cd "$ROOT"
mkdir -p runs/tests
record="runs/tests/$(date -u +%Y%m%dT%H%M%S)"
commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
status=0
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --durations=25 --junitxml="$record.xml" -o junit_suite_name="$commit" \
    --support-file="$record.json" "$@" || status=$?
if [ $# -eq 0 ]; then
    "$PYTHON" tools/test_table.py "$record.xml" docs/tests.md
    "$PYTHON" tools/support_table.py "$record.json" README.md
fi
exit "$status"
