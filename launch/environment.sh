# shellcheck shell=bash
# Sourced by launch/demo.sh and tests/run.sh: find a Python, make .venv in the repository's root, install into it.
# Sets $PYTHON to the environment's interpreter. A complete environment is reused.

say() { printf '\n== %s\n' "$*"; }

# megatron-core ships compiled wheels for these two.
SUPPORTED_PYTHONS="3.12 3.13"

is_supported_python() {
    [ -x "$1" ] && "$1" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] not in '$SUPPORTED_PYTHONS'.split())" 2>/dev/null
}

find_python() {
    local version candidate
    for version in $SUPPORTED_PYTHONS; do
        for candidate in \
            "$(command -v "python$version" || true)" "$(command -v python3 || true)" "$(command -v python || true)" \
            "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$version"*/bin/python \
            "$(command -v uv >/dev/null && uv python find "$version" 2>/dev/null || true)"; do
            if is_supported_python "$candidate"; then
                echo "$candidate"
                return 0
            fi
        done
    done
    echo "No Python ${SUPPORTED_PYTHONS// / or } with venv was found on PATH, in pyenv or in uv. Get one with one of:" >&2
    echo "    uv python install 3.12      |  pyenv install 3.12  |  apt-get install python3.12-venv" >&2
    return 1
}

make_environment() {
    local root="$1" python stamp
    PYTHON="$root/.venv/bin/python"
    # The stamp is written last, so that an interrupted installation is repeated.
    # Settings of linters, at the end of pyproject.toml, do not change it.
    stamp="$( (sed '/^\[tool\.ruff/,$d' "$root/pyproject.toml"; cat "$root/launch/constraints.txt") | cksum)"
    if [ "$(cat "$root/.venv/.complete" 2>/dev/null)" = "$stamp" ] && "$PYTHON" -c "import torch" 2>/dev/null; then
        say "environment: reusing $root/.venv"
        return 0
    fi
    python="$(find_python)" || return 1
    say "environment: making $root/.venv with $("$python" --version) (downloads torch, several GB)"
    rm -rf "$root/.venv"
    "$python" -m venv "$root/.venv"
    "$PYTHON" -m pip install --quiet --progress-bar off --constraint "$root/launch/constraints.txt" \
        --editable "${root}[megatron,train,tools,test,paper]" emerging-optimizers
    echo "$stamp" >"$root/.venv/.complete"
}
