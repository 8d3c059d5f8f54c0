#!/usr/bin/env bash
# Runs the tests in two processes with eight virtual CPU devices each (tests/conftest.py).
#   bash launch/test.sh [--quick] [PYTEST_ARGUMENT ...]
#   --quick  leave out the tests marked slow (about two minutes on two cores)
#   PYTHON, VENV, INSTALL: see launch/setup.sh
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ "${1:-}" == --quick ]]; then
  shift
  set -- -m "not slow" "$@"
fi
# A process that dies ends the tests with a report; pytest-xdist's replacements can wait for ever.
# tests/conftest.py orders the files.
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
