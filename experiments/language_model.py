"""Level 3: the tail and the mismatch of a real language model.

    python -m experiments.language_model

SmolLM2-135M-Instruct solves additions in its own words, at temperature 1, and learns from its
responses with DRPO for a few rollouts, without FP8 and with two of its recipes (experiments/plan.md).
--model: the directory that launch/smollm2.sh creates. Writes experiments/results/language_model.json and
prints the table.
"""

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from drpo_jax import config as C
from drpo_jax.cli import load_config, use_compilation_cache
from drpo_jax.host_memory import return_compilation_memory
from drpo_jax.loop import Collector, Run, initial_model, rl_step
from experiments.small.cell import recorded_environment

MODEL = flags.DEFINE_string("model", "models/smollm2-135m", "Directory of the converted model.")

RESULTS = Path(__file__).parent / "results" / "language_model.json"
RECIPES = "none", "rollout", "e2e"
STEPS = 3
FIELDS = {
    "data.digits": 1,
    "data.system": "",  # The template's own message, with which the model was trained.
    "data.instruction": "{problem} Explain your reasoning, then give the result.",
    "sampler.max_prompt_length": 64,
    "sampler.max_response_length": 64,
    "sampler.slots": 32,
    "train.prompts": 4,
    "train.samples": 8,
    "train.mini_batch_prompts": 2,
    "train.micro_batch": 8,
    "train.epochs": 2,
    "train.pack": True,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "evaluate.problems": 8,  # Fewer than the hundred that exist; none is evaluated.
    "log.mismatch_every": 1,
}
# Means over the rollouts. A share of a share may be undefined in a rollout without such tokens.
COLUMNS = {
    "response/length": "length",
    "policy/tail": "µ ≤ 0.01",
    "mismatch/logp": "mean |Δ log p|",
    "mismatch/shift": "mean |Δp|",
    "mismatch/outside": "outside before",
    "mismatch/diverged": "beyond at the update",
    "mismatch/diverged_before": "of these before",
}


def measure(recipe: str, model: str) -> dict[str, list[float | None]]:
    """Returns `COLUMNS` of each rollout under a recipe of precision; None where a share is undefined."""
    config = load_config("configs/smollm2_135m.py")
    config.update_from_flattened_dict({**FIELDS, "model.path": model, "precision.recipe": recipe})
    with tempfile.TemporaryDirectory() as workdir:
        run = Run.create(C.resolve(config), Path(workdir))
        rows: dict[str, list[float | None]] = {name: [] for name in COLUMNS}
        with jax.set_mesh(run.mesh):
            state, collector = run.programs.restart(initial_model(run)), Collector()
            for step in range(STEPS):
                state, metrics, _ = rl_step(run, collector, state, step)
                for name, values in rows.items():
                    defined = name in metrics and math.isfinite(metrics[name])
                    values.append(float(metrics[name]) if defined else None)
                print(f"recipe {recipe}, rollout {step + 1} of {STEPS}", flush=True)
    return rows


def table(recipes: dict[str, dict[str, list[float | None]]]) -> str:
    """Returns the means as a table in Markdown."""
    lines = [" | ".join(["recipe", *COLUMNS.values()]), "|".join(["---"] * (len(COLUMNS) + 1))]
    for recipe, rows in recipes.items():
        cells = [f"`{recipe}`"]
        for name in COLUMNS:
            values = [value for value in rows[name] if value is not None]
            cells.append(f"{statistics.fmean(values):.3g}" if values else "–")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(_: Any) -> None:
    use_compilation_cache("auto")
    return_compilation_memory()
    logging.set_verbosity(logging.WARNING)
    recipes = {}
    for recipe in RECIPES:
        recipes[recipe] = measure(recipe, MODEL.value)
        jax.clear_caches()
    content = {
        "command": "python -m experiments.language_model",
        "environment": recorded_environment(),
        "fields": FIELDS,
        "recipes": recipes,
    }
    RESULTS.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(table(recipes))


if __name__ == "__main__":
    app.run(main)
