#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]. They see 8 CPU devices (tests/conftest.py).
#   PYTHON, VENV  see setup.sh
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
