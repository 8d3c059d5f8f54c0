#!/usr/bin/env bash
# Trains configs/tiny.py on this machine: creates the environment, warm-starts the model and runs DRPO
# (about six minutes on two cores).
#   bash launch/local.sh [--config.FIELD=VALUE ...] [--compare=surrogate]
#   WORKDIR  directory of the run; resumed if it holds one (default: runs/tiny)
#   PYTHON, VENV, INSTALL: see launch/setup.sh
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m drpo_jax train --config=configs/tiny.py --workdir="${WORKDIR:-runs/tiny}" "$@"
