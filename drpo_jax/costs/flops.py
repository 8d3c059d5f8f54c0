"""Analytic FLOPs: what the equations of the model need. A multiply-add counts as two.

The counts cover matmuls, attention and recurrences, and omit norms, softmax and other elementwise work.
A token of a mixture of experts pays only for the experts that it visits. Attention counts the mean
number of keys that a token attends to. A gated DeltaNet counts by its recurrence, not by the larger
matmuls of its chunked form.
"""

import dataclasses

from drpo_jax.models import ModelConfig


def layers_flops(config: ModelConfig, keys: float) -> float:
    """FLOPs of the forward pass of one token through all layers.

    Args:
      config: the architecture.
      keys: number of keys that the token attends to, itself included. The mean over T tokens is
        (T + 1) / 2.
    """
    d, heads = config.hidden_size, config.heads * config.head_dim
    queries = heads * (2 if config.attention_gate else 1)
    attention = 2 * d * (queries + 2 * config.kv_heads * config.head_dim + heads) + 4 * heads * keys
    attending = config.layers // config.full_attention_every
    total = attending * attention + (config.layers - attending) * _delta_net(config)
    if config.experts:
        mlp = 2 * d * config.experts + 6 * d * config.experts_per_token * config.expert_size
        if config.shared_expert_size:
            mlp += 6 * d * config.shared_expert_size + 2 * d
    else:
        mlp = 6 * d * config.mlp_size
    return total + config.layers * mlp


def head_flops(config: ModelConfig) -> float:
    """FLOPs of the logits of one token."""
    return 2 * config.hidden_size * config.vocab_size


def _delta_net(config):
    d, state = config.hidden_size, config.linear_value_heads
    values = state * config.linear_value_dim
    channels = 2 * config.linear_key_heads * config.linear_key_dim + values
    projections = 2 * d * (channels + 2 * values + 2 * state)
    # Reading S for k and for q, and updating it: three multiply-adds for each of its entries.
    recurrence = 6 * values * config.linear_key_dim
    return projections + 2 * config.linear_conv_kernel * channels + recurrence


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one call of a program, summed over all devices.

    Attributes:
      model: FLOPs of the equations.
      executed: the same, plus what the backward pass recomputes to save memory.
    """

    model: float
    executed: float


def scoring(config: ModelConfig, sequences: int, prompt: int, response: int) -> Work:
    """The forward pass that scores responses: layers on prompt and response, head on the response.

    Args:
      config: the architecture.
      sequences: number of responses.
      prompt, response: lengths in tokens.
    """
    length = prompt + response
    layers = length * layers_flops(config, (length + 1) / 2)
    flops = sequences * (layers + response * head_flops(config))
    return Work(flops, flops)


def training(config: ModelConfig, sequences: int, prompt: int, response: int, remat: str) -> Work:
    """Forward and backward pass, with two backward matmuls for each forward matmul.

    The head never recomputes its logits. remat = "full" runs every layer once more. "dots" keeps the
    results of matmuls, so it recomputes nothing that counts here.
    """
    length = prompt + response
    layers = sequences * length * layers_flops(config, (length + 1) / 2)
    head = sequences * response * head_flops(config)
    model = 3 * (layers + head)
    return Work(model, model + (layers if remat == "full" else 0.0))


def reading(config: ModelConfig, tokens: int, context: float) -> Work:
    """Prefill of prompt tokens that attend to half of `context` tokens on average, without the head."""
    flops = tokens * layers_flops(config, (context + 1) / 2)
    return Work(flops, flops)


def decoding(config: ModelConfig, tokens: int, context: float) -> Work:
    """Decoding of tokens that attend to `context` tokens on average."""
    flops = tokens * (layers_flops(config, context) + head_flops(config))
    return Work(flops, flops)


def generating(
    config: ModelConfig, sequences: int, prompts: int, prompt: int, response: int
) -> float:
    """FLOPs of sampling responses token by token. Each prompt is prefilled once for all its samples.

    Args:
      config: the architecture.
      sequences: number of responses.
      prompts: number of prompts.
      prompt, response: lengths in tokens.
    """
    reading = prompts * (prompt * layers_flops(config, (prompt + 1) / 2) + head_flops(config))
    token = layers_flops(config, prompt + (response + 1) / 2) + head_flops(config)
    return reading + sequences * response * token
