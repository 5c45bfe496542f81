#!/bin/sh
# Makes the virtual environment $VENV (default .venv) with Nullspace and the named extras, once:
#     ./setup.sh worker,embedded
# Needs nothing but Python 3.10 or later with venv. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")"
exec >&2 # standard output belongs to the command that this prepares

VENV=${VENV:-.venv}
EXTRAS=${1:-worker,embedded}
STAMP=$VENV/.installed-$(printf %s "$EXTRAS" | tr , -)

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }

for done in "$STAMP"*; do # one with more extras will do
    if [ -e "$done" ] && [ -z "$(find pyproject.toml constraints.txt setup.sh -newer "$done")" ]; then
        exit 0
    fi
done

# 1. an interpreter
good() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
if [ -n "${PYTHON:-}" ]; then
    good "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.10 or later"
else
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        if good "$name"; then PYTHON=$name; break; fi
    done
    [ -n "${PYTHON:-}" ] || fail "no Python 3.10 or later was found on the PATH. Install it (the
    system's package python3), or name one: make PYTHON=/path/to/python3"
fi
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON lacks the modules venv and ensurepip.
    On Debian and Ubuntu: apt install python3-venv. Or name another: make PYTHON=/path/to/python3"

# 2. the environment
if ! [ -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "setup: making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV" || fail "$VENV could not be made: is the folder writable, the disk full?"
fi
python=$VENV/bin/python

# 3. the packages
gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; }
configured() {
    [ -n "${PIP_FIND_LINKS:-}${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ] ||
        "$python" -m pip config list 2>/dev/null | grep -Eq '(find-links|index-url)='
}
if gpu; then EXTRAS="$EXTRAS,gpu"; fi
with_pip() { "$python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$EXTRAS]"; }
with_uv() {
    "$python" -m pip install --disable-pip-version-check --quiet uv &&
        "$python" -m uv pip install --python "$python" --torch-backend=cpu -c constraints.txt -e ".[$EXTRAS]"
}
say "setup: installing Nullspace with [$EXTRAS] (once; some minutes)"
if [ "$(uname -s)" = Linux ] && ! gpu && ! configured; then
    # Without a GPU the default build of torch would fetch gigabytes of CUDA; uv knows the other one.
    with_uv || { say "setup: uv did not manage; trying pip"; with_pip; }
else
    with_pip
fi || fail "the packages could not be installed; the lines above say why. Behind a proxy or a mirror, set
    pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CERT) and run again"

touch "$STAMP"
say "setup: done"
