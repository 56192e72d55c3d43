#!/usr/bin/env bash
# Run every test there is, the slow ones as well. Arguments go to pytest.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/environment.sh"
make_environment "$ROOT"
cd "$ROOT"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --durations=25 "$@"
