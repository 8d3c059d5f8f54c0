"""Measures the tail of the warm starts, and that the outcome depends on it.

    python -m experiments.small.tail [SETTING …]        default: moe_fp8_rollout

For each warm start of a setting, from 8 sampled responses to each of 192 held-out problems:

    tail         share of the sampled tokens with µ <= 0.01
    tail_marks   share of these that are marks
    care         share of the responses that begin with a careful mark
    careful      accuracy of these
    hasty        accuracy of the others

and by intervention, with the first mark of the response set by hand, on the problems with a carry:

    forced_careful, forced_hasty   accuracy after a careful, and after a hasty mark, drawn from the
                                   frequencies in the demonstrations
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, logging

from drpo_jax.cli import use_compilation_cache
from drpo_jax.data import marked
from drpo_jax.data.tokenizer import MARKS
from drpo_jax.loop import Run, initial_model
from drpo_jax.objectives.diagnostics import TAIL
from drpo_jax.run import EVALUATE, NOISE
from experiments.small import results as files
from experiments.small.arms import SETTINGS
from experiments.small.cell import cell_config, make_warm_start, recorded_environment
from experiments.small.plan import WARM_STARTS, Cell

WORKDIR = Path("runs/small")  # The default of experiments.small.
PROBLEMS, SAMPLES = 192, 8


def measure(cell: Cell, workdir: Path) -> dict[str, float]:
    """Returns the figures of the warm start of a cell, see the module's docstring."""
    config = cell_config(cell, workdir, **{"evaluate.problems": PROBLEMS})
    longer = {"sampler.max_prompt_length": config.sampler.max_prompt_length + 1}
    config = cell_config(cell, workdir, **{"evaluate.problems": PROBLEMS}, **longer)
    run = Run.create(config, workdir, train=False)
    with jax.set_mesh(run.mesh):
        sampler = run.programs.sampler
        sampler.load(run.programs.sync(initial_model(run), run.key(0, NOISE)))
        figures = _free(run, sampler)
        rng, law = np.random.default_rng(0), marked.mark_law(config.data)
        careful = marked.is_careful(config.data)
        for name, chosen in (("forced_careful", careful), ("forced_hasty", ~careful)):
            p = np.where(chosen, law, 0)
            figures[name] = _forced(
                run, sampler, rng.choice(len(law), p=p / p.sum(), size=PROBLEMS)
            )
    return {name: round(float(value), 4) for name, value in figures.items()}


def _free(run, sampler):
    """The figures of responses that the policy samples without intervention."""
    params = run.programs.sampling_params
    tail, marks, care, right = [], [], [], []
    is_mark = np.array([run.tokenizer.decode([i]) in MARKS for i in range(2, 256)])
    for group in run.sample(sampler, run.heldout, params, run.key(0, EVALUATE)):
        rollouts = group.rollouts
        mask = rollouts.mask()
        rare = (rollouts.full_logp <= np.log(TAIL)) & mask
        for row, text in enumerate(group.texts):
            start, length = rollouts.prompt_lengths[row], rollouts.response_lengths[row]
            ids = rollouts.tokens[row, start : start + length]
            tail.append(rare[row, :length])
            marks.append((ids >= 2) & is_mark[np.maximum(ids, 2) - 2])
            care.append(marked.chooses_care(text, run.config.data))
        right += list(group.rewards.result())
    tail, marks = np.concatenate(tail), np.concatenate(marks)
    right, care = np.array(right), np.array(care)
    return {
        "tail": tail.mean(),
        "tail_marks": (tail & marks).sum() / max(tail.sum(), 1),
        "care": care.mean(),
        "accuracy": right.mean(),
        "careful": right[care].mean(),
        "hasty": right[~care].mean(),
    }


def _forced(run, sampler, ranks):
    """The accuracy with the first mark given, on the problems with a carry."""
    pairs = [(p, MARKS[r]) for p, r in zip(run.heldout, ranks) if marked.has_carry(p)]
    prompts = [run.tokenizer.encode(problem.prompt + mark) for problem, mark in pairs]
    right = []
    key = jax.random.fold_in(run.key(0, EVALUATE), 1)
    for index, rollouts in sampler.stream(prompts, run.programs.sampling_params, key):
        problem, mark = pairs[index]
        texts = [mark + text for text in rollouts.texts(run.tokenizer)]
        right += [run.reward.function(problem.prompt, text, problem.answer) for text in texts]
    return np.mean(right)


def main(arguments: Sequence[str]) -> None:
    use_compilation_cache("auto")
    logging.set_verbosity(logging.WARNING)
    for setting in arguments[1:] or SETTINGS[:1]:
        rows = {}
        for number in range(WARM_STARTS):
            cell = Cell(setting, "recipe", "drpo", 1e-4, number)
            make_warm_start(cell, WORKDIR)
            rows[f"warm start {number}"] = row = measure(cell, WORKDIR)
            print(f"warm start {number}  " + "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
        command = f"python -m experiments.small.tail {setting}"
        content = {"command": command, "environment": recorded_environment(), "figures": rows}
        files.DIRECTORY.mkdir(parents=True, exist_ok=True)
        path = files.DIRECTORY / f"tail_{setting}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
