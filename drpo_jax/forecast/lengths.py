"""The lengths of prompts and responses that a forecast is made for.

`--lengths` is a distribution, such as mean:1500,max:8192, or a rollout file.

Axis letters: P prompts of a rollout, G samples of a prompt, N = P · G responses.
"""

import dataclasses
from statistics import NormalDist

import numpy as np
from ml_collections import ConfigDict

from drpo_jax.learner.rollout_checks import Limits, read_rollouts
from drpo_jax.learner.rollout_file import SUFFIXES
from drpo_jax.storage import path_of

# Standard deviation of the logarithm of a response's length before the cut. Lengths are positive and
# skewed, with a long tail: at sigma 1, the 99th percentile is ten times the median, and the coefficient
# of variation is 1.3. Measured in one public RL step (github.com/Tjh-UKN/vime, train.metrics.jsonl): 256
# responses, 62.9 % of them cut off at 4,096 tokens, 3,344 on average, 319 at least. The mean belongs to
# sigma 1.26 and the shortest response to 1.1; at sigma 1, the mean would be 3,439.
SIGMA = 1.0

KEYS = {
    "mean": "mean tokens of a response",
    "max": "tokens at which a response is cut off, by default sampler.max_response_length",
    "prompt": "tokens of a prompt, by default sampler.max_prompt_length",
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the prompts and responses of a rollout, in tokens.

    Attributes:
      prompts: int [P].
      responses: int [P, G].
      source: where they are from, in words.
    """

    prompts: np.ndarray
    responses: np.ndarray
    source: str

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the prompt length and the response length of every response, int [N] each."""
        return np.repeat(self.prompts, self.responses.shape[1]), self.responses.reshape(-1)


def parse_lengths(text: str, config: ConfigDict) -> Lengths:
    """Returns the lengths of a rollout of a config.

    Args:
      text: KEY:NUMBER pairs, see `KEYS`, or the path of a rollout file.
      config: a resolved config.

    Raises:
      ValueError: the text is neither, or its lengths do not fit the config; the file is damaged.
      OSError: the file cannot be read.
    """
    if text.endswith(SUFFIXES):
        return _from_file(text, config)
    sizes = _sizes(text, config)
    train = config.train
    responses = quantiles(sizes["mean"], int(sizes["max"]), train.prompts * train.samples)
    responses = np.random.default_rng(config.seed).permutation(responses)
    return Lengths(
        np.full(train.prompts, int(sizes["prompt"])),
        responses.reshape(train.prompts, train.samples),
        f"log-normal lengths (sigma {SIGMA:g}) cut off at {sizes['max']:,g}",
    )


def quantiles(mean: float, longest: int, count: int) -> np.ndarray:
    """Returns a log-normal distribution, cut off at a maximum, as quantiles in ascending order.

    These are the lengths at the probabilities (i + ½) / count, which makes a forecast independent of
    random draws. The median is chosen such that the mean after the cut is `mean`, up to rounding.

    Args:
      mean: mean tokens of a response, from 1 to `longest`.
      longest: tokens at which responses are cut off.
      count: number of responses.
    """
    normal = NormalDist()
    spread = SIGMA * np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])

    def lengths(log_median):
        return np.clip(np.exp(log_median + spread), 1, longest)

    # At these ends, all lengths are 1 and `longest`; the mean rises in between.
    low, high = -spread[-1], np.log(longest) - spread[0]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return np.rint(lengths(high)).astype(int)


def _sizes(text, config):
    """Returns the numbers of KEY:NUMBER pairs, with their defaults."""
    sampler = config.sampler
    most = {"max": sampler.max_response_length, "prompt": sampler.max_prompt_length}
    sizes: dict[str, float] = {}
    for pair in text.split(","):
        key, colon, value = pair.partition(":")
        if not colon:
            raise ValueError(
                f"--lengths={text}: neither KEY:NUMBER pairs, such as mean:1500,max:8192, nor a rollout "
                f"file ({' or '.join(SUFFIXES)})"
            )
        if key not in KEYS:
            known = "; ".join(f"{name}: {meaning}" for name, meaning in KEYS.items())
            raise ValueError(f"--lengths={text}: unknown key {key!r}. The keys are {known}")
        try:
            sizes[key] = float(value) if key == "mean" else int(value)
        except ValueError:
            kind = "a number" if key == "mean" else "an integer"
            raise ValueError(f"--lengths={text}: {key} must be {kind}, got {value!r}") from None
    if "mean" not in sizes:
        raise ValueError(f"--lengths={text}: mean is missing, for example mean:1500")
    for key, bound in most.items():
        if not 1 <= sizes.setdefault(key, bound) <= bound:
            field = {"max": "max_response_length", "prompt": "max_prompt_length"}[key]
            raise ValueError(
                f"--lengths={text}: {key} must be from 1 to sampler.{field} = {bound}, got {sizes[key]}"
            )
    if not 1 <= sizes["mean"] <= sizes["max"]:
        raise ValueError(
            f"--lengths={text}: mean must be from 1 to max = {sizes['max']}, got {sizes['mean']:g}"
        )
    return sizes


def _from_file(text, config):
    """Returns the lengths of a rollout file.

    The groups stay together. If the file has fewer groups, or fewer responses per group, than a rollout
    of the config, they repeat; if it has more, the first ones are taken.
    """
    train, sampler = config.train, config.sampler
    limits = Limits(
        prompt_tokens=sampler.max_prompt_length, response_tokens=sampler.max_response_length
    )
    rollout = read_rollouts(path_of(text), limits, train.samples)
    groups = len(np.unique(rollout["group"]))
    prompts, responses = (
        rollout[name].reshape(groups, -1) for name in ("prompt_lengths", "response_lengths")
    )
    group = np.arange(train.prompts) % groups
    sample = np.arange(train.samples) % responses.shape[1]
    return Lengths(prompts[group, 0], responses[group[:, None], sample], f"lengths of {text}")
