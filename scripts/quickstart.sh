#!/usr/bin/env bash
# From a prompt to a picture on a bare machine; serves until Ctrl-C, or stops after the picture.
# Usage: scripts/quickstart.sh ["a lighthouse at dawn"] [--once]
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE # compiling at every start takes seconds

./scripts/bootstrap.sh
exec .venv/bin/python -m scripts.quickstart "$@"
