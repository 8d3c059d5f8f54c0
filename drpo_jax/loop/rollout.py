"""Sample and verify: one rollout of the current policy.

Axis letters: N responses, R response tokens, T prompt and response tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.data import Problem
from drpo_jax.errors import bad_input
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.loop.verdicts import shaping, verifier_metrics, verify
from drpo_jax.models import Transformer
from drpo_jax.objectives import add_to_responses
from drpo_jax.run import NOISE, SAMPLE, SHUFFLE, Group, Run
from drpo_jax.sampler import Rollouts
from drpo_jax.storage import pack_texts, unpack_texts


class Example(NamedTuple):
    """One sampled response as text."""

    prompt: str
    response: str
    answer: str
    reward: float


class SamplingScores(NamedTuple):
    """The learner's scores of a rollout under its weights at the time of sampling.

    Attributes:
      logp: float32 [N, R], under the learner's own weights.
      synced_logp: float32 [N, R], under the sampler's weights. They differ from the learner's only with
        precision.noise; otherwise this is `logp` itself.
      version: version of these weights. A rollout with groups from earlier steps also has tokens of
        earlier versions, see `loop.choice`.
    """

    logp: Any
    synced_logp: Any
    version: int

    def own(self, responses: Rollouts) -> np.ndarray:
        """Returns bool [N, R], True for the tokens that these weights sampled."""
        return responses.mask() & (responses.version == self.version)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One rollout on the host: N = prompts · samples responses, the samples of a prompt adjacent.

    Attributes:
      problems: the problem of every response, N of them.
      responses: `sampler.Rollouts`: tokens [N, T], logprobs [N, R], lengths [N].
      reward: float32 [N], the verifier's verdict.
      added: float32 [N], what `config.reward` adds to it.
      measured: metrics of the weight sync, the sampler and the verifier.
      scores: the scores under the sampling weights, if these may differ from the learner's
        (train.staleness) and a measurement needs them; else None.
      token_reward: float32 [N, R], the verdict on each token, NaN where a token has none; `reward` is
        the sum. None if the reward is per response.
      advantage: float32 [N, R], Â from a rollout file; None: from the rewards.
      loss_mask: bool [N, R], the tokens that carry a loss according to a rollout file; None: all that
        the model sampled.
    """

    problems: Sequence[Problem]
    responses: Rollouts
    reward: np.ndarray
    added: np.ndarray
    measured: Mapping[str, float]
    scores: SamplingScores | None = None
    token_reward: np.ndarray | None = None
    advantage: np.ndarray | None = None
    loss_mask: np.ndarray | None = None

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

    def staleness(self, step: int) -> dict[str, float]:
        """Returns the metrics staleness/… of the tokens that the model sampled.

        Args:
          step: number of completed steps, the version of the learner's weights.
        """
        age = step - self.responses.version[self.responses.mask()]
        return {"staleness/mean": age.mean(), "staleness/max": age.max()}

    def arrays(self, tokenizer: Any, samples: int) -> dict[str, Any]:
        """Returns the arrays of `learner.record` except those that the learner computes.

        Args:
          samples: responses to each problem.
        """
        responses, problems = self.responses, self.problems
        piece_ids, piece_texts = responses.pieces(tokenizer)
        from_file = {"file_advantage": self.advantage, "file_loss_mask": self.loss_mask}
        return {name: array for name, array in from_file.items() if array is not None} | dict(
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
        """Returns the rollout as arrays of plain dtypes, from which `restore` recreates it."""
        arrays = {"reward": self.reward, "added": self.added}
        arrays |= {f"responses.{name}": a for name, a in vars(self.responses).items()}
        arrays |= {f"problems.{name}": a for name, a in pack_problems(self.problems).items()}
        for name in ("token_reward", "advantage", "loss_mask"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = array
        for name, value in self.measured.items():
            arrays[f"measured.{name}"] = np.array(value, np.float64)
        if self.scores:
            arrays["scores.logp"] = self.scores.logp
            arrays["scores.version"] = np.array(self.scores.version)
            if self.scores.synced_logp is not self.scores.logp:
                arrays["scores.synced_logp"] = self.scores.synced_logp
        return arrays

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> "Rollout":
        """Returns the rollout whose `state` is in the arrays."""
        measured = {name: float(value) for name, value in below(arrays, "measured").items()}
        scores: SamplingScores | None = None
        if parts := below(arrays, "scores"):
            synced_logp = parts.get("synced_logp", parts["logp"])
            scores = SamplingScores(parts["logp"], synced_logp, int(parts["version"]))
        return cls(
            problems=unpack_problems(below(arrays, "problems")),
            responses=Rollouts(**below(arrays, "responses")),
            reward=arrays["reward"],
            added=arrays["added"],
            measured=measured,
            scores=scores,
            token_reward=arrays.get("token_reward"),
            advantage=arrays.get("advantage"),
            loss_mask=arrays.get("loss_mask"),
        )


def pack_problems(problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """Returns problems as arrays of plain dtypes, from which `unpack_problems` creates equal problems.

    The token ids of encoded problems are omitted, because the texts determine them.
    """
    arrays = {}
    for f in dataclasses.fields(Problem):
        texts = pack_texts(getattr(problem, f.name) for problem in problems)
        arrays[f"{f.name}.utf8"], arrays[f"{f.name}.ends"] = texts
    return arrays


def unpack_problems(arrays: Mapping[str, np.ndarray]) -> list[Problem]:
    """Returns the problems that `pack_problems` packed."""
    texts = [
        unpack_texts(arrays[f"{f.name}.utf8"], arrays[f"{f.name}.ends"])
        for f in dataclasses.fields(Problem)
    ]
    return [Problem(*values) for values in zip(*texts)]


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays named `prefix.NAME`, by NAME."""
    start = f"{prefix}."
    return {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A rollout whose verdicts may still be in flight.

    Attributes:
      run: the run.
      groups: the groups in the order of the rollout.
      problems, responses, measured, scores: as in `Rollout`.
    """

    run: Run
    groups: Sequence[Group]
    problems: Sequence[Problem]
    responses: Rollouts
    measured: Mapping[str, float]
    scores: SamplingScores | None = None

    def verify(self) -> Rollout:
        """Waits for the verdicts of all processes; every process calls it."""
        verdicts = verify(self.run, self.groups)
        measured = {**self.measured, **verifier_metrics(verdicts)}
        return Rollout(
            self.problems,
            self.responses,
            verdicts["reward"],
            verdicts["added"],
            measured,
            self.scores,
            verdicts.get("token_reward"),
        )


def sample(run: Run, model: Transformer, step: int, version: int, timer: PhaseTimer) -> Sampled:
    """Samples the rollout of a step and starts its verification.

    Args:
      model: the policy.
      step: the step that learns from the rollout; it determines problems and random numbers.
      version: number of completed steps, the version of the policy's weights.
      timer: measures the phases sync and sample.
    """
    config, sampler = run.config, run.programs.sampler
    assert run.train_problems is not None  # None only in an evaluation
    measured = synchronize(run, model, step, version, timer)
    with timer("sample"):
        problems = run.train_problems.batch(step, config.train.prompts)
        params, key = run.programs.sampling_params, run.key(step, SAMPLE)
        groups = sorted(run.sample(sampler, problems, params, key), key=lambda group: group.index)
        measured |= unload(run)
        responses = Rollouts.concatenate([group.rollouts for group in groups])
    repeated = [problem for problem in problems for _ in range(config.train.samples)]
    return Sampled(run, groups, repeated, responses, measured)


def synchronize(
    run: Run, model: Transformer, step: int, version: int, timer: PhaseTimer
) -> dict[str, float]:
    """Loads the policy's weights into the sampler and returns metrics.

    Args: as for `sample`.
    """
    sampler = run.programs.sampler
    with timer("sync"):
        noise = run.key(step, NOISE)
        sampler.load(jax.block_until_ready(run.programs.sync(model, noise)), version=version)
        sampler.read_statistics()  # Drops the counts of an evaluation with this sampler.
    return {"sync/gigabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(sampler.model)) / 1e9}


def unload(run: Run) -> dict[str, float]:
    """Frees the memory of the sampler's weights for the updates, and returns the sampler's metrics."""
    sampler = run.programs.sampler
    sampler.load(None)
    counts = sampler.read_statistics()
    return {
        "sampler/live_rows": counts["live_rows"]
        / max(counts["steps"], 1)
        / run.config.sampler.slots,
        "sampler/decode_steps": counts["steps"],
    }


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
    masked = (arrays["loss_mask"] != arrays["response_mask"]).any()
    return Rollout(
        problems,
        responses,
        arrays["reward"],
        added,
        measured={},
        advantage=arrays.get("advantage"),
        loss_mask=arrays["loss_mask"] if masked else None,
    )


def _problems(run: Run, arrays: dict[str, np.ndarray]) -> list[Problem]:
    """Returns the problem of every response of a replay; texts that are not in the files are empty."""
    problems: list[Problem] = []
    samples = run.config.train.samples
    for row in range(0, len(arrays["group"]), samples):
        texts = {
            name: arrays[name][row] for name in ("prompt", "answer", "kind", "id") if name in arrays
        }
        problem = Problem(**{"prompt": "", "answer": "", "kind": "", "id": ""} | texts)
        problems += [problem] * samples
    return problems


def training_reward(config: FrozenConfigDict, rollout: Rollout, step: int) -> np.ndarray:
    """Returns the training reward, verdict plus shaping terms: float32 [N], or [N, R] with NaN.

    The control experiment train.shuffle_rewards permutes it over the rollout.
    """
    if rollout.token_reward is not None:
        lengths = rollout.responses.response_lengths
        return add_to_responses(rollout.token_reward, rollout.added, lengths)
    reward = rollout.reward + rollout.added
    if config.train.shuffle_rewards:
        reward = np.random.default_rng([config.seed, step, SHUFFLE, 1]).permutation(reward)
    return reward
