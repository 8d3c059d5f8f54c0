"""Saved rollouts: what the learner saw of every sampled token, for notebooks and reports.

`rollouts/step_000020.npz` is a NumPy archive (`np.load(path)`), with N sequences, prompt-major, the
samples of a prompt next to each other; T tokens of prompt and response; R response tokens:

    tokens            int32 [N, T]    prompt and response without a gap, zeros behind
    prompt_lengths    int32 [N]
    response_lengths  int32 [N]       the stop token counts
    response_mask     bool [N, R]     which of the arrays below are of a sampled token
    behavior_logp     float32 [N, R]  log µ, as the ratio was anchored
    sampled_logp      float32 [N, R]  logprob under the distribution it was drawn from (top-k, top-p)
    old_logp          float32 [N, R]  log π_old: as the learner scored it before its first update
    logp              float32 [N, R]  log π at the update that used the token (first epoch)
    coefficient       float32 [N, R]  c = ∂J/∂logp; with the KL penalty and the correction, if any
    weight            float32 [N, R]  w = c / (r·Â), of the objective alone
    entropy           float32 [N, R]  of π at the token, nats
    advantage         float32 [N]     Â, of the reward with what is added to it, if anything
    reward            float32 [N]     the verifier's verdict
    finished          bool [N]        ended with a stop token
    version           int32 [N]       of the weights that sampled it, in steps of the run
    piece_ids         int32 [U]       the distinct response tokens, ascending
    piece_texts       unicode [U]     the text of each by itself (see `pieces`)
    id, prompt, answer, kind          unicode [N], of the problem
    response          text [N], derived from the token ids; on disk as UTF-8 in one piece,
                      `response_utf8` uint8, and where each ends, `response_ends` int64 [N]
    step              int             rollout step
"""

import io
from pathlib import Path

import numpy as np

from drpo_jax.storage import write_whole


def rollout_path(workdir: Path, step: int) -> Path:
    return workdir / "rollouts" / f"step_{step:06d}.npz"


def save_rollout(workdir: Path, step: int, **arrays) -> Path:
    """Writes the arrays of the module's docstring; a file is whole or not there."""
    path = rollout_path(workdir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An array of strings would give each the room of the longest.
    if "response" in arrays:
        texts = [text.encode("utf-8", "replace") for text in arrays.pop("response")]
        arrays["response_utf8"] = np.frombuffer(b"".join(texts), np.uint8)
        arrays["response_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    file = io.BytesIO()
    np.savez_compressed(file, step=step, **arrays)
    write_whole(path, file.getvalue())
    return path


def pieces(rollout, row) -> list[str]:
    """The text of each token of a response by itself; part of a character becomes U+FFFD."""
    start, length = rollout["prompt_lengths"][row], rollout["response_lengths"][row]
    ids = rollout["tokens"][row, start : start + length]
    return rollout["piece_texts"][np.searchsorted(rollout["piece_ids"], ids)].tolist()


def load_rollout(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a saved rollout by name."""
    with np.load(path.open("rb")) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if "response_ends" in arrays:
        utf8, ends = arrays.pop("response_utf8").tobytes(), arrays.pop("response_ends").tolist()
        texts = [utf8[i:j].decode() for i, j in zip([0, *ends], ends)]
        arrays["response"] = np.array(texts, dtype=object)
    return arrays
