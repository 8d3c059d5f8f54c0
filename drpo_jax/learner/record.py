"""Saved rollouts: every sampled token as the learner saw it, for notebooks and reports.

`rollouts/step_000021.npz` is the rollout of step 21, sampled with the weights of checkpoint 20 (with
train.staleness = k, of checkpoint 20 − k). It is a NumPy archive, which `np.load(path)` opens. It has N
sequences, with the samples of a prompt contiguous, T tokens of prompt and response, and R response
tokens:

    group             int64 [N]       number of the problem in the rollout
    tokens            int32 [N, T]    prompt and response without a gap, then zeros
    prompt_lengths    int32 [N]
    response_lengths  int32 [N]       including the stop token
    response_mask     bool [N, R]     where the arrays below belong to a token that the model sampled
    loss_mask         bool [N, R]     the tokens that carry a loss: by default all of response_mask
    behavior_logp     float32 [N, R]  log µ as the objective took it
    full_logp         float32 [N, R]  log µ as the sampler recorded it, before top-k and top-p
    sampled_logp      float32 [N, R]  logprob under the distribution it was drawn from (top-k, top-p)
    old_logp          float32 [N, R]  log π_old, the learner's score before the first update
    logp              float32 [N, R]  log π at the update that used the token (first epoch); this and the
                                      next three are 0 for tokens without a loss
    coefficient       float32 [N, R]  c = ∂J/∂logp, including penalties and correction
    weight            float32 [N, R]  w = c / (r·Â) of the objective alone
    entropy           float32 [N, R]  entropy of π at the token, nats
    advantage         float32 [N]     Â, from the reward and what is added to it
                                      (with a baseline per token: float32 [N, R])
    reward            float32 [N]     the verdict of the verifier
    finished          bool [N]        the response ended with a stop token
    version           int32 [N, R]    version of the weights that sampled each token, in steps of the
                                      run; −1 where the model sampled nothing. Earlier files: int32 [N]
    piece_ids         int32 [U]       the distinct response tokens, ascending
    piece_texts       unicode [U]     the text of each of them (see `pieces`)
    id, prompt, answer, kind          unicode [N], of the problem
    response          text [N], derived from the token ids. On disk all texts are one UTF-8 string,
                      `response_utf8` uint8, and `response_ends` int64 [N] has the end of each
    step              int             rollout step, from 1 as in metrics.jsonl

A replay of files that contain advantages or loss masks also saves these, as `file_advantage`
(float32 [N, R]) and `file_loss_mask` (bool [N, R]).
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from drpo_jax.storage import pack_texts, unpack_texts, write_whole


def rollout_path(workdir: Path, step: int) -> Path:
    """Returns the path of the rollout that a step saved."""
    return workdir / "rollouts" / f"step_{step:06d}.npz"


def saved_rollouts(workdir: Path) -> dict[int, Path]:
    """The files of the saved rollouts by step, ascending; {} where none is saved."""
    paths = sorted((workdir / "rollouts").glob("step_*.npz"))
    return {int(path.stem.removeprefix("step_")): path for path in paths}


def save_rollout(workdir: Path, step: int, **arrays: Any) -> Path:
    """Writes the arrays listed in the module's docstring, atomically.

    Returns:
      The path of the file.
    """
    path = rollout_path(workdir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "response" in arrays:
        packed = pack_texts(arrays.pop("response"), errors="replace")
        arrays["response_utf8"], arrays["response_ends"] = packed
    file = io.BytesIO()
    np.savez_compressed(file, step=step, **arrays)
    write_whole(path, file.getvalue())
    return path


def pieces(rollout: Mapping[str, np.ndarray], row: int) -> list[str]:
    """Returns the text of each token of a response. Partial characters become U+FFFD."""
    start, length = rollout["prompt_lengths"][row], rollout["response_lengths"][row]
    ids = rollout["tokens"][row, start : start + length]
    return rollout["piece_texts"][np.searchsorted(rollout["piece_ids"], ids)].tolist()


def response_advantages(rollout: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns Â of each response, float32 [N]: with Â per token, the mean over the response."""
    advantage, mask = rollout["advantage"], rollout["response_mask"]
    if advantage.ndim == 1:
        return advantage
    return (advantage * mask).sum(1) / np.maximum(mask.sum(1), 1)


def load_rollout(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a saved rollout by name.

    Raises:
      ValueError: the file is damaged; the message names it.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            return arrays_of(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def arrays_of(file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns the arrays of a saved rollout from an open file.

    Raises:
      ValueError: the file is not a NumPy archive, is damaged, or has objects in it.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        OSError,
        EOFError,
        AttributeError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"not a readable NumPy archive: {error}") from error
    if "response_ends" in arrays:
        texts = unpack_texts(arrays.pop("response_utf8"), arrays.pop("response_ends"))
        arrays["response"] = np.array(texts, dtype=object)
    if "response_mask" in arrays:  # Earlier versions saved no loss mask.
        arrays.setdefault("loss_mask", arrays["response_mask"])
    return arrays
