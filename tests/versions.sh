#!/usr/bin/env bash
# Run every test of real Megatron on other releases than the environment's, or on Megatron-LM checkouts, slow ones too, and
# leave the outcomes in runs/tests/versions/VERSION.json and .xml; tests/support_table.py makes the table of
# docs/results/versions.md from them.
#     ./tests/versions.sh                            # every release that has Megatron's own loop
#     ./tests/versions.sh 0.18.2 -- -m "not slow"    # one; what follows -- goes to pytest
#     ./tests/versions.sh -- -m releases             # of --lion-gather only the selection that covers each setting
#     ./tests/versions.sh /path/to/Megatron-LM       # a checkout, with its dataset helpers compiled (make)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/environment.sh"
make_environment "$ROOT"
cd "$ROOT"

versions=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    versions+=("$1")
    shift
done
[ $# -eq 0 ] || shift
ask() { PYTHONPATH=. "$PYTHON" -c "from tests import versions; print($1)" | tail -1; }
[ ${#versions[@]} -gt 0 ] || read -ra versions <<< "$(ask "*versions.others_with_a_loop()")"

mkdir -p runs/tests/versions
status=0
for version in "${versions[@]}"; do
    if [ -d "$version" ]; then
        folder="$version"
    else
        folder="$(ask "versions.wheel('$version')")"
    fi
    record="runs/tests/versions/$(PYTHONPATH="$folder:." "$PYTHON" -c "
from megatron_lion.integration.compat import versions; print(versions.megatron_version())")"
    say "tests/megatron on megatron-core of $folder"
    # Its own file of tests goes through all releases by itself.
    OMP_NUM_THREADS=1 PYTHONPATH="$folder" "$PYTHON" -m pytest tests/megatron --ignore tests/megatron/test_versions.py \
        --junitxml="$record.xml" --support-file="$record.json" "$@" || status=$?
done
exit "$status"
