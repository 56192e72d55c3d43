#!/usr/bin/env bash
# Make the environment that the demo uses and run every test that continuous integration runs. Arguments go to pytest.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/environment.sh"
make_environment "$ROOT"
cd "$ROOT"
export OMP_NUM_THREADS=1

say "style and types"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy

say "tests"
"$PYTHON" -m pytest -m "not slow" --durations=10 "$@"
