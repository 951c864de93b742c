#!/usr/bin/env bash
# Set up, check format, style, types, Docker files and locked requirements, then run every test on real servers.
# Usage: scripts/test.sh [--faults] [pytest arguments]      (--faults: only the fault scenarios, at full size)
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE # compiling at every start takes seconds

TESTS=(-n 2 --dist worksteal)
if [ "${1:-}" = --faults ]; then
    shift
    export FAULTS=full
    TESTS=(tests/faults) # one at a time: each has its bounds in seconds, and needs the machine for itself
fi

step() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    "$@" || { echo "== $name failed" >&2 && exit 1; }
    echo "== $name: $((SECONDS - begin)) s"
}

step "set-up" ./scripts/bootstrap.sh --dev
step "format" .venv/bin/python -m ruff format --check .
step "style" .venv/bin/python -m ruff check .
step "types" .venv/bin/python -m mypy
step "Dockerfile" .venv/bin/hadolint Dockerfile
step "compose file" .venv/bin/python -m check_jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
step "locked requirements" ./scripts/lock.sh --check
echo "== tests"
exec .venv/bin/python -m pytest "${TESTS[@]}" "$@"
