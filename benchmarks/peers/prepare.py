"""Writes the files of a shape: weights, tokenizer, prompts and the batch of an update (see `work`)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.peers.work import PROBLEMS, VOCABULARY, Shape, word
from drpo_jax.models import ModelConfig, Transformer, save_pretrained

# Factor on the initial matrices. Logprobs then vary by several nats between tokens and depend on the
# positions, so that a wrong model does not pass the comparison of logprobs.
SCALE = 4.0
NOISE = 0.1  # Standard deviation of log µ around the model's logprobs, nats.


def prepare(shape: Shape, directory: Path) -> None:
    """Writes the files of a shape into a directory, the same ones at every call."""
    directory.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(**shape.model)
    model = jax.jit(lambda key: _scaled(Transformer(config, key)))(jax.random.key(0))
    _write_tokenizer(directory / "model")
    save_pretrained(model, config, directory / "model")
    rng = np.random.default_rng(0)
    prompts = rng.integers(VOCABULARY, size=(PROBLEMS, shape.prompt))
    answer = str(shape.response)
    lines = [
        json.dumps({"prompt": " ".join(map(word, prompt)), "answer": answer}) for prompt in prompts
    ]
    (directory / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = rng.integers(VOCABULARY, size=(shape.sequences, shape.prompt + shape.response))
    logp = np.asarray(_response_logp(model, jnp.asarray(tokens, jnp.int32), shape.prompt))
    noise = NOISE * rng.standard_normal(logp.shape)
    advantage = rng.standard_normal(shape.sequences)
    np.savez(
        directory / "batch.npz",
        tokens=tokens,
        old_logp=(logp + noise).astype(np.float32),
        advantage=advantage.astype(np.float32),
    )


def _scaled(model: Transformer) -> Transformer:
    """Returns the model with its matrices multiplied by `SCALE`; norms have one axis per layer."""
    return jax.tree.map(lambda x: x * SCALE if x.ndim > 2 else x, model)


@nnx.jit(static_argnums=2)
def _response_logp(model: Transformer, tokens: jax.Array, prompt: int) -> jax.Array:
    """Returns the logprobs of the response tokens, float32 [N, R].

    Args:
      tokens: int32 [N, P + R].
      prompt: P.
    """
    logp = jax.nn.log_softmax(model(tokens)[:, prompt - 1 : -1])
    return jnp.take_along_axis(logp, tokens[:, prompt:, None], axis=-1)[..., 0]


def _write_tokenizer(directory: Path) -> None:
    """Writes a tokenizer of `VOCABULARY` words.

    Its end of sequence is a plain word, because this project requires one; no contender uses it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": word(VOCABULARY - 1)}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields) + "\n")
