"""Level 3: the tail and the mismatch of a real language model.

    python -m experiments.language_model

SmolLM2-135M-Instruct solves additions in its own words, at temperature 1, and learns from its
responses with DRPO for a few rollouts, without FP8 and with two of its recipes (experiments/plan.md).
For comparison, the learner scores `TEXT` twice, in rows of two widths.
--model: the directory that launch/smollm2.sh creates. Writes each recipe to
experiments/results/language_model.json when it is finished, skips those that are already there, and
prints the table. Delete the file to measure again.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from drpo_jax import config as C
from drpo_jax.cli import load_config, use_compilation_cache
from drpo_jax.host_memory import return_compilation_memory
from drpo_jax.loop import Collector, Run, initial_model, rl_step
from drpo_jax.models import Compute
from drpo_jax.precision import get_recipe
from drpo_jax.sampler.token import token_logp
from experiments.small.cell import recorded_environment

MODEL = flags.DEFINE_string("model", "models/smollm2-135m", "Directory of the converted model.")

RESULTS = Path(__file__).parent / "results" / "language_model.json"
RECIPES = "none", "rollout", "e2e"
STEPS = 3
TEXT = """
The policy is updated several times on one rollout, so its probabilities drift away from those
that the tokens were drawn with. A trust region limits this drift. If the sampler rounds its
weights to eight bits, its probabilities differ from those of the learner before any update has
been made, and a limit on the difference no longer measures the drift alone.
"""
TOKENS = 64  # The learner scores this many of TEXT.
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
# Means over the rollouts; "of these before" is a share of the tokens beyond the boundary in all of them.
# It is undefined in a rollout without such tokens.
COLUMNS = {
    "response/length": "length",
    "policy/tail": "µ ≤ 0.01",
    "mismatch/logp": r"mean \|Δ log p\|",
    "mismatch/shift": r"mean \|Δp\|",
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


def learner_difference(recipe: str, model: str) -> float:
    """Returns the mean |Δ log p| of two of the learner's programs, for the first `TOKENS` of `TEXT`.

    Both compute the same function of the same weights and tokens in float32. The second one has padding
    after them.
    """
    config = load_config("configs/smollm2_135m.py")
    config.update_from_flattened_dict({"model.path": model, "precision.recipe": recipe})
    with tempfile.TemporaryDirectory() as workdir:
        run = Run.create(C.resolve(config), Path(workdir))
        policy = initial_model(run)
    compute = Compute(dtype=config.compute.dtype, matmul=get_recipe(recipe).learner)
    tokens = jnp.array([run.tokenizer.encode(TEXT)[:TOKENS]])

    @jax.jit
    def score(policy, tokens):
        logits = policy(tokens, segment_ids=(tokens >= 0).astype(int), compute=compute)
        return token_logp(logits[0, : TOKENS - 1], tokens[0, 1:TOKENS])

    padded = jnp.pad(tokens, ((0, 0), (0, TOKENS // 2)), constant_values=-1)
    return float(jnp.mean(abs(score(policy, tokens) - score(policy, padded))))


def table(content: dict[str, Any]) -> str:
    """Returns the means as a table in Markdown."""
    head = ["recipe", *COLUMNS.values(), r"learner against itself, mean \|Δ log p\|"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for recipe, rows in content["recipes"].items():
        cells = [f"`{recipe}`"]
        for name in COLUMNS:
            values, weights = np.array(rows[name], float), np.ones(STEPS)
            if name == "mismatch/diverged_before":
                weights = np.multiply(rows["mismatch/diverged"], rows["response/length"])
            known = np.isfinite(values)
            cells.append(f"{np.average(values[known], weights=weights[known]):.3g}")
        lines.append(" | ".join([*cells, f"{content['learner'][recipe]:.3g}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main(_: Any) -> None:
    use_compilation_cache("auto")
    return_compilation_memory()
    logging.set_verbosity(logging.WARNING)
    inputs = {"fields": FIELDS, "steps": STEPS, "text": TEXT, "tokens": TOKENS}
    content: dict[str, Any] = {
        "command": "python -m experiments.language_model",
        "environment": recorded_environment(),
        **inputs,
        "recipes": {},
        "learner": {},
    }
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
        if any(stored[name] != value for name, value in inputs.items()):
            sys.exit(f"{RESULTS} has results of other fields; move it away to measure again")
        content = stored
    for recipe in RECIPES:
        for name, function in (("recipes", measure), ("learner", learner_difference)):
            if recipe not in content[name]:
                content[name][recipe] = function(recipe, MODEL.value)
                RESULTS.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                jax.clear_caches()
    print(table(content))


if __name__ == "__main__":
    app.run(main)
