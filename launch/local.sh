#!/usr/bin/env bash
# Trains configs/tiny.py on this machine: makes the environment, warm-starts, runs DRPO.
#   bash launch/local.sh [--config.FIELD=VALUE ...]
#   WORKDIR  directory of the run, resumed if it holds one (default: runs/tiny)
#   PYTHON, VENV  see setup.sh
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m drpo_jax.train --config=configs/tiny.py --workdir="${WORKDIR:-runs/tiny}" "$@"
