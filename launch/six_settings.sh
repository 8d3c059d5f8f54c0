#!/usr/bin/env bash
# Compiles the paper's six settings for TPU slices and prints the table of docs/devices.md. No TPU required.
#   bash launch/six_settings.sh
# Takes an hour or two. A setting whose results exist is not compiled again; delete them after changing the
# code.
#   FIGURES  directory of the results and of preflight's output (default: .cache/six_settings)
#   PYTHON, VENV, INSTALL: see launch/setup.sh; libtpu is needed as well (preflight says how to install it)
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

figures=${FIGURES:-.cache/six_settings}
mkdir -p "$figures"
while read -r name topology config; do
  test -s "$figures/$name.json" && continue
  echo "compiling $name for $topology; output: $figures/$name.log" >&2
  python -m drpo_jax preflight --config="configs/$config" --topology="$topology" \
    --json="$figures/$name.json" > "$figures/$name.log" 2>&1 ||
    { echo "exit status $?:" && tail -n 3 "$figures/$name.log"; } >&2
done << 'SETTINGS'
R1-Distill-Qwen-1.5B v5e:4x4 r1_distill_qwen_1_5b.py
Qwen3-4B-Base v6e:4x4 qwen3_4b_base.py
Qwen3-30B-A3B-Base,bf16 v5p:4x4x4 qwen3_30b_a3b.py:bf16
Qwen3-30B-A3B-Base,fp8_rollout v5p:4x4x4 qwen3_30b_a3b.py:fp8_rollout
Qwen3-30B-A3B-Base,fp8_e2e v5p:4x4x4 qwen3_30b_a3b.py:fp8_e2e
Qwen3.5-35B-A3B-Base v5p:4x4x4 qwen3_5_35b_a3b.py
SETTINGS

python - "$figures"/*.json << 'TABLE'
import json
import sys
from pathlib import Path

PROGRAMS = ["sync", "rescore", "update", "prefill", "first_tokens", "admit", "decode"]
BOUNDS = ["decode, s", "limit, s", "ratio", "step, s", "limit, s", "ratio", "MFU"]
print("| setting | slice | mesh | sampler's mesh |", " | ".join([*PROGRAMS, "most", *BOUNDS]), "|")
print("|" + "---|" * (len(PROGRAMS) + len(BOUNDS) + 5))
for path in map(Path, sys.argv[1:]):
    figures = json.loads(path.read_text())
    meshes = [
        " · ".join(f"{name} {size}" for name, size in figures[mesh].items() if size > 1)
        for mesh in ("mesh", "sampler_mesh")
    ]
    memory = [figures["programs"][name]["memory"]["total"] for name in PROGRAMS]
    step = figures["step"]
    bounds = ["–"] * len(BOUNDS)
    if step["seconds"]:
        decode, limits = figures["programs"]["decode"], figures["limits"]
        bounds = []
        for bound, limit in (
            (decode["calls"] * max(decode["seconds"].values()), limits["decode"]),
            (step["seconds"], limits["decode"] + limits["update"]),
        ):
            bounds += [f"{bound:.3g}", f"{limit:.3g}", f"{bound / limit:.2f}"]
        bounds.append(f"{step['mfu']:.0%}")
    share = f"{max(memory) / figures['chip']['memory']:.0%}"
    share += "" if figures["fits"] else ", too much"
    gib = [f"{size / 2**30:.3g}" for size in memory]
    setting = path.stem.replace(",", ", ")
    print("|", " | ".join([setting, figures["topology"], *meshes, *gib, share, *bounds]), "|")
TABLE
