#!/usr/bin/env bash
# Bring uv.lock up to pyproject.toml, and the hash-pinned requirement files up to uv.lock.
# Usage: scripts/lock.sh [--check]      (--check: change nothing, fail when one of the files is behind)
set -euo pipefail
cd "$(dirname "$0")/.."
unset UV_DEFAULT_INDEX UV_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL # a mirror's name must not get into uv.lock

main() {
    if [ "${1:-}" = --check ]; then
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        mkdir "$folder/requirements"
        lock --check --offline --quiet || fail "uv.lock is not what pyproject.toml says: run scripts/lock.sh."
        export_to "$folder"
        for file in requirements.txt requirements/embedded.txt requirements/dev.txt; do
            cmp "$folder/$file" "$file" || fail "$file is not what uv.lock says: run scripts/lock.sh."
        done
        return
    fi
    ./scripts/bootstrap.sh
    lock
    export_to .
}

lock() {
    .venv/bin/python -m uv lock --default-index https://pypi.org/simple "$@"
}

export_to() {
    export_group --no-default-groups >"$1/requirements.txt"
    export_group --only-group embedded >"$1/requirements/embedded.txt"
    export_group --only-group dev >"$1/requirements/dev.txt"
}

export_group() {
    .venv/bin/python -m uv export --quiet --frozen --no-header --no-emit-project --no-annotate "$@"
}

fail() {
    echo "$1" >&2
    exit 1
}

main "$@"
