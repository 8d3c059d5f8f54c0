"""Sample and verify: one rollout of the current policy.

Axis letters: N responses, R response tokens, T prompt and response tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax import rewards
from drpo_jax.data import Problem
from drpo_jax.errors import bad_input
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.models import Transformer
from drpo_jax.objectives import add_to_responses
from drpo_jax.parallel import multihost
from drpo_jax.rewards import Verdict
from drpo_jax.run import NOISE, SAMPLE, SHUFFLE, Group, Run
from drpo_jax.sampler import Rollouts
from drpo_jax.storage import pack_texts, unpack_texts


class Example(NamedTuple):
    """One sampled response in readable form."""

    prompt: str
    response: str
    answer: str
    reward: float


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One rollout on the host: N = prompts · samples responses, the samples of a prompt adjacent.

    Attributes:
      problems: the problem of every response, N of them.
      responses: `sampler.Rollouts`: tokens [N, T], logprobs [N, R], lengths [N].
      reward: float32 [N], the verifier's verdict.
      added: float32 [N], what `config.reward` adds to it.
      measured: metrics of the weight sync, the sampler and the verifier.
      token_reward: float32 [N, R], the verdict by token, NaN where a token has none. None if the reward
        is one of whole responses, else `reward` is the sum.
    """

    problems: Sequence[Problem]
    responses: Rollouts
    reward: np.ndarray
    added: np.ndarray
    measured: Mapping[str, float]
    token_reward: np.ndarray | None = None

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the rollout: reward/…, response/…, sampler/… and sync/…."""
        lengths = self.responses.response_lengths
        return {
            **self.measured,
            "reward/mean": self.reward.mean(),
            "reward/added": self.added.mean(),
            "response/length": lengths.mean(),
            "response/length_max": lengths.max(),
            "response/truncated": 1 - self.responses.finished.mean(),
        }

    def arrays(self, tokenizer: Any, samples: int) -> dict[str, Any]:
        """Returns the arrays of `learner.record` except for the learner's view of the rollout.

        Args:
          samples: responses to each problem.
        """
        responses, problems = self.responses, self.problems
        piece_ids, piece_texts = responses.pieces(tokenizer)
        return dict(
            group=np.arange(len(problems)) // samples,
            tokens=responses.tokens,
            prompt_lengths=responses.prompt_lengths,
            response_lengths=responses.response_lengths,
            response_mask=responses.mask(),
            sampled_logp=responses.sampled_logp,
            full_logp=responses.full_logp,
            reward=self.reward,
            finished=responses.finished,
            version=responses.version,
            piece_ids=piece_ids,
            piece_texts=piece_texts,
            id=np.array([p.id for p in problems]),
            prompt=np.array([p.prompt for p in problems]),
            response=responses.texts(tokenizer),
            answer=np.array([p.answer for p in problems]),
            kind=np.array([p.kind for p in problems]),
        )

    def example(self, tokenizer: Any) -> Example:
        """Returns the first response."""
        problem, text = self.problems[0], tokenizer.decode(self.responses.response(0))
        return Example(problem.prompt, text, problem.answer, float(self.reward[0]))

    def state(self) -> dict[str, np.ndarray]:
        """Returns the rollout as arrays without objects, of which `restore` makes the same rollout."""
        arrays = {"reward": self.reward, "added": self.added}
        if self.token_reward is not None:
            arrays["token_reward"] = self.token_reward
        arrays |= {
            f"responses.{f.name}": getattr(self.responses, f.name)
            for f in dataclasses.fields(Rollouts)
        }
        for f in dataclasses.fields(Problem):
            texts = pack_texts(getattr(problem, f.name) for problem in self.problems)
            arrays[f"problems.{f.name}.utf8"], arrays[f"problems.{f.name}.ends"] = texts
        for name, value in self.measured.items():
            arrays[f"measured.{name}"] = np.array(value, np.float64)
        return arrays

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> "Rollout":
        """Returns the rollout whose `state` the arrays are."""
        texts = [
            unpack_texts(arrays[f"problems.{f.name}.utf8"], arrays[f"problems.{f.name}.ends"])
            for f in dataclasses.fields(Problem)
        ]
        measured = {name: float(value) for name, value in below(arrays, "measured").items()}
        return cls(
            problems=[Problem(*values) for values in zip(*texts)],
            responses=Rollouts(**below(arrays, "responses")),
            reward=arrays["reward"],
            added=arrays["added"],
            measured=measured,
            token_reward=arrays.get("token_reward"),
        )


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose names are `prefix.NAME`, by NAME."""
    start = f"{prefix}."
    return {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}


def sample_and_verify(
    run: Run, model: Transformer, step: int, version: int, timer: PhaseTimer
) -> Rollout:
    """Samples and verifies the rollout of a step.

    Args:
      model: the policy.
      step: the step that learns from the rollout; it determines problems and random numbers.
      version: number of completed steps, the version of the policy's weights.
      timer: measures the phases sync, sample and reward.
    """
    config, sampler = run.config, run.programs.sampler
    assert run.train_problems is not None  # None only in an evaluation
    with timer("sync"):
        noise = run.key(step, NOISE)
        sampler.load(jax.block_until_ready(run.programs.sync(model, noise)), version=version)
    synced_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(sampler.model))
    with timer("sample"):
        problems = run.train_problems.batch(step, config.train.prompts)
        params, key = run.programs.sampling_params, run.key(step, SAMPLE)
        groups = sorted(run.sample(sampler, problems, params, key), key=lambda group: group.index)
        sampler.load(None)  # The updates need the memory of its weights.
        counts = sampler.read_statistics()
        responses = Rollouts.concatenate([group.rollouts for group in groups])
    with timer("reward"):
        verdicts, measured = _verify(run, groups, responses)
    measured |= {
        "sync/gigabytes": synced_bytes / 1e9,
        "sampler/live_rows": counts["live_rows"] / max(counts["steps"], 1) / config.sampler.slots,
        "sampler/decode_steps": counts["steps"],
    }
    run.train_problems.observe(problems, verdicts["reward"].reshape(len(problems), -1))
    repeated = [problem for problem in problems for _ in range(config.train.samples)]
    return Rollout(repeated, responses, measured=measured, **verdicts)


def replayed(run: Run, step: int, timer: PhaseTimer) -> Rollout:
    """Reads the rollout of a step from the files of `run.replay`.

    Args:
      timer: measures the phase sample.
    """
    assert run.replay is not None
    run.interrupts.check()
    with timer("sample"), bad_input():
        arrays = run.replay.rollout(step, run.config.train.prompts)
    shape = arrays["full_logp"].shape
    no_tokens = np.zeros((*shape, 0), np.int32)
    responses = Rollouts(
        tokens=arrays["tokens"],
        prompt_lengths=arrays["prompt_lengths"],
        response_lengths=arrays["response_lengths"],
        sampled_logp=arrays["sampled_logp"],
        full_logp=arrays["full_logp"],
        entropy=np.zeros(shape, np.float32),
        finished=arrays["finished"],
        top_ids=no_tokens,
        top_logp=no_tokens.astype(np.float32),
        routes=np.zeros((*arrays["tokens"].shape, 0, 0), np.int16),
        version=arrays["version"],
    )
    problems = _problems(run, arrays)
    lengths = responses.response_lengths
    added = shaping(run.config, responses.texts(run.tokenizer), lengths)
    return Rollout(problems, responses, arrays["reward"], added, measured={})


def _problems(run: Run, arrays: dict[str, np.ndarray]) -> list[Problem]:
    """Returns the problem of every response of a replay; texts that the files lack are empty."""
    problems: list[Problem] = []
    samples = run.config.train.samples
    for row in range(0, len(arrays["group"]), samples):
        texts = {
            name: arrays[name][row] for name in ("prompt", "answer", "kind", "id") if name in arrays
        }
        problem = Problem(**{"prompt": "", "answer": "", "kind": "", "id": ""} | texts)
        problems += [problem] * samples
    return problems


def _verify(run: Run, groups: Sequence[Group], responses: Rollouts):
    """Waits for the rewards of this process's groups and gathers those of the other processes.

    Args:
      groups: in the order of the rollout.
      responses: of all groups.

    Returns:
      reward, added and perhaps token_reward of the `Rollout`, by name; and the metrics of the verifier.
    """
    pending = [group.rewards for group in groups if group.rewards is not None]
    verdicts = [verdict for rewards in pending for verdict in rewards.verdicts()]
    texts = [text for group in groups for text in group.texts]
    lengths = responses.response_lengths.reshape(-1, run.config.train.samples)
    own_lengths = multihost.share(lengths).reshape(-1)
    by_token: dict[str, Any] = {}
    if run.reward.per_token:
        time = responses.sampled_logp.shape[1]
        by_token["token_reward"] = _token_rewards(verdicts, own_lengths, time)
    parts = multihost.gather(
        "rewards",
        reward=np.array([verdict.value for verdict in verdicts], np.float32),
        limited=np.array([verdict.limited for verdict in verdicts], np.float32),
        lost=np.array([verdict.lost for verdict in verdicts], np.float32),
        retries=np.array([verdict.retries for verdict in verdicts], np.int32),
        added=shaping(run.config, texts, own_lengths),
        **by_token,
    )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {
        "reward/limited": arrays["limited"].mean(),
        "reward/lost": arrays["lost"].mean(),
        "reward/retries": arrays["retries"].sum(),
    }
    return {name: arrays[name] for name in ("reward", "added", *by_token)}, metrics


def _token_rewards(verdicts: Sequence[Verdict], lengths: np.ndarray, time: int) -> np.ndarray:
    """Returns the rewards of the tokens, float32 [N, R], NaN where there is none.

    A verdict of the whole response counts for its last token.
    """
    rewards_NxR = np.full((len(verdicts), time), np.nan, np.float32)
    for row, (verdict, length) in enumerate(zip(verdicts, lengths, strict=True)):
        if verdict.tokens is not None:
            rewards_NxR[row, :length] = [np.nan if r is None else r for r in verdict.tokens]
        elif length:
            rewards_NxR[row, length - 1] = verdict.value
    return rewards_NxR


def shaping(config: FrozenConfigDict, texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Returns what `config.reward` adds to the verdicts, float32 [N].

    Args:
      texts: N responses.
      lengths: int32 [N], their tokens.
    """
    added = np.zeros(len(texts), np.float32)
    if config.reward.format:
        added += config.reward.format * rewards.format_reward(texts)
    if buffer := config.reward.overlong_buffer:
        added += rewards.overlong_penalty(lengths, config.sampler.max_response_length, buffer)
    return added


def training_reward(config: FrozenConfigDict, rollout: Rollout, step: int) -> np.ndarray:
    """Returns the reward to learn from, float32 [N], or [N, R] with NaN: verdict plus shaping.

    The control experiment train.shuffle_rewards permutes it over the rollout.
    """
    if rollout.token_reward is not None:
        lengths = rollout.responses.response_lengths
        return add_to_responses(rollout.token_reward, rollout.added, lengths)
    reward = rollout.reward + rollout.added
    if config.train.shuffle_rewards:
        reward = np.random.default_rng([config.seed, step, SHUFFLE, 1]).permutation(reward)
    return reward
