"""A tiny Hugging Face checkpoint with a tokenizer of bytes, and a config that starts from it."""

import json
from functools import partial

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drpo_jax.config import default_config, resolve
from drpo_jax.models import ModelConfig, Transformer, save_pretrained

MODEL = ModelConfig(
    vocab_size=272, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=48,
    rope_theta=1e4, tie_embeddings=True,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory):
    """Writes a tokenizer of bytes with a chat template."""
    special = ["<end>", "<system>", "<user>", "<assistant>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(directory)


def write_checkpoint(directory):
    """Writes a model with random weights and its tokenizer, and returns the model."""
    model = jax.jit(partial(Transformer, MODEL))(jax.random.key(7))
    save_pretrained(model, MODEL, directory)
    fields = json.loads((directory / "config.json").read_text())
    fields |= {"max_position_embeddings": 512, "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(fields))
    write_tokenizer(directory)
    return model


def config(path, explicit=(), **fields):
    """Returns a resolved config that starts from a checkpoint, with fields (a__b for a.b) changed."""
    config = default_config()
    config.model.path = str(path)
    config.data.update(task="chain_sum", digits=1, operations="+", chat=True, system="Add.")
    config.sampler.update(max_prompt_length=40, max_response_length=6, slots=16, decode_steps=6)
    config.train.update(steps=2, prompts=2, samples=4, mini_batch_prompts=1, micro_batch=4)
    config.train.save_rollout_every = 1
    config.optimizer.learning_rate = 1e-3
    config.evaluate.update(problems=4, samples=2, greedy=False)
    config.mesh.data = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return resolve(config, explicit)
