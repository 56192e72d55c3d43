#!/usr/bin/env bash
# Run every test there is, the slow ones as well, then those of real Megatron on its other releases too, and write the tables
# of docs/results/: tests.md, support.md and versions.md. Arguments go to pytest; a part (-k, -m, a file) runs no other
# releases and writes no table: give the XML files of all parts to tests/outcome_table.py.
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
    "$PYTHON" tests/outcome_table.py "$record.xml" docs/results/tests.md
    "$PYTHON" tests/support_table.py "$record.json" docs/results/support.md
    "$PYTHON" tests/support_table.py --entries "$record.json" docs/frameworks.md
    ./tests/versions.sh || status=$?
    own="$(PYTHONPATH=. "$PYTHON" -c "from megatron_lion.integration.compat import versions; print(versions.megatron_version())")"
    "$PYTHON" tests/support_table.py runs/tests/versions/*.json "$own=$record.json" docs/results/versions.md
fi
exit "$status"
