#!/usr/bin/env bash
# usage: containers/install.sh [MEGATRON]
#
# Install this clone into the Python of an image that has torch, and MEGATRON with it, such as megatron-core==0.19.2.
# Nothing that the image has is replaced: dependencies are not installed, and the build uses the image's setuptools.
# PYTHON names the interpreter (default: python3).
set -euo pipefail

case "${1:-}" in --help | -h) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
python="${PYTHON:-python3}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -n "${1:-}" ]; then
    "$python" -m pip install --no-cache-dir --no-deps "$1"
fi
"$python" -m pip install --no-cache-dir --no-deps --no-build-isolation "$root"
cd /
"$python" -c "import torch, megatron_lion; print('megatron-lion', megatron_lion.__version__, 'with torch', torch.__version__)"
