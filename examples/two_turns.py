"""Two turns with a tool: python examples/two_turns.py [STEPS]

A model with random weights learns to call a calculator. It writes a few tokens, the calculator appends
the value of the last sum or difference among them, and the model continues. The calculator's tokens
carry no loss.
"""

import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.config import default_config, resolve
from drpo_jax.learner import TrainState
from drpo_jax.loop.learn import make_loss_mask, make_updates, objective_inputs
from drpo_jax.loop.warm_start import random_model
from drpo_jax.models import Transformer
from drpo_jax.problems import encode
from drpo_jax.rewards import last_integer
from drpo_jax.run import NOISE, SAMPLE, Run
from drpo_jax.sampler import Rollouts

# Tokens after which the calculator answers even if the model has not ended its turn.
FIRST_TURN = 8
CALL = re.compile(r"(\d+)([+-])(\d+)")


def get_config() -> FrozenConfigDict:
    """Returns a config for a CPU: a small dense model, and sums of one digit in single characters."""
    config = default_config()
    config.model.update(vocab_size=32, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16)
    config.model.mlp_size = 128
    config.data.update(task="arithmetic", digits=1, operations="+")
    config.sampler.update(max_prompt_length=16, max_response_length=20, slots=64, decode_steps=8)
    config.train.update(prompts=16, samples=8, mini_batch_prompts=16, micro_batch=128)
    config.optimizer.learning_rate = 3e-3
    config.evaluate.problems = 16
    return resolve(config)


def calculator(text: str) -> str:
    """Returns the tool's output after a first turn: the value of its last call, or a question mark."""
    calls = CALL.findall(text)
    if not calls:
        return "?\n"
    left, operation, right = calls[-1]
    return f"={int(left) + int(right) if operation == '+' else int(left) - int(right)}\n"[:8]


def reward(first: str, second: str, answer: str) -> float:
    """Returns 0.5 for a call, and 0.5 if the second turn ends with the answer."""
    return 0.5 * bool(CALL.search(first)) + 0.5 * (last_integer(second) == answer)


def two_turns(run: Run, model: Transformer, step: int) -> tuple[Rollouts, np.ndarray]:
    """Samples both turns of a rollout.

    Args:
      model: the policy.
      step: number of completed steps, which determines problems and random numbers.

    Returns:
      The responses, including the calculator's tokens, and their rewards, float32 [N].
    """
    sampler, params, tokenizer = run.programs.sampler, run.programs.sampling_params, run.tokenizer
    sampler.load(run.programs.sync(model, run.key(step, NOISE)), version=step)
    problems = run.train_problems.batch(step, run.config.train.prompts)
    prompts, key = encode(run.config, tokenizer, problems), run.key(step, SAMPLE)

    limits = np.full((len(prompts), params.samples), FIRST_TURN)
    begun = dict(sampler.stream(prompts, params, key, limits=limits))
    for i, group in begun.items():
        begun[i] = group.append([tokenizer.encode(calculator(t)) for t in group.texts(tokenizer)])
    whole = dict(sampler.stream(prompts, params, key, begun=begun))

    rewards = []
    for i, problem in enumerate(problems):
        ends = begun[i].response_lengths
        for row, end in enumerate(ends):
            ids, length = whole[i].response(row), int(np.flatnonzero(~begun[i].mask()[row])[0])
            turns = tokenizer.decode(ids[:length]), tokenizer.decode(ids[end:])
            rewards.append(reward(*turns, problem.answer))
    groups = [whole[i] for i in range(len(prompts))]
    return Rollouts.concatenate(groups), np.array(rewards, np.float32)


def update(
    run: Run, state: TrainState, rollouts: Rollouts, rewards: np.ndarray, step: int
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Runs an update in which only the tokens that the model sampled carry a loss.

    Args:
      state: donated.

    Returns:
      The new state, and the update's trace of the tokens, float32 [N, R] by name.
    """
    inputs = objective_inputs(run, state.model, rollouts, rewards, step, rescore=False).arrays
    mask = make_loss_mask(run.config, rollouts)  # Without tokens of version −1.
    state, trace, _ = make_updates(run, state, rollouts, inputs, mask, step, keep=True)
    return state, trace


def main(steps: int) -> None:
    """Trains for some steps; prints the reward, an example, and the fraction of the tool's tokens."""
    with tempfile.TemporaryDirectory() as directory:
        run = Run.create(get_config(), Path(directory))
        with jax.set_mesh(run.mesh):
            state = run.programs.restart(random_model(run))
            for step in range(steps):
                rollouts, rewards = two_turns(run, state.model, step)
                state, trace = update(run, state, rollouts, rewards, step)
                inside = np.arange(rollouts.version.shape[1]) < rollouts.response_lengths[:, None]
                tool = inside & (rollouts.version < 0)
                pull = abs(trace["coefficient"])
                print(
                    f"step {step + 1:3}  reward {rewards.mean():.2f}  tokens of the tool "
                    f"{100 * tool.sum() / inside.sum():.0f} %  Σ|c| of the model {pull.sum():.1f}, of "
                    f"the tool {pull[tool].sum():.1f}  {rollouts.texts(run.tokenizer)[0]!r}"
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 12)
