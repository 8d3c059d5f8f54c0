"""The sampler: continuous batching, with the logprob of every sampled token.

A request is one sample of one prompt. Its life, with the shapes of the arrays:

    queue     `Sampler.stream` checks the prompts and returns a `Flight`, the host side of the call,
              which keeps a queue of requests.
    prefill   While slots are free, the next P prompts are prefilled in chunks of tokens [P, T], once
              per prompt for all its samples. Each attention layer has a cache of keys and values [P,
              columns, K, H]; the last chunk returns hidden states [P, D]. `first_tokens` samples the
              first token of each of the P · samples requests from them. A response from an earlier call
              is prefilled together with its prompt, in a separate row.
    slot      `admit` copies the prompt's caches into a free slot and sets the slot's state, int32 [B].
    decode    One device call runs up to S decode steps. Each step runs the model on one token per slot
              [B], computes logits [B, V], samples tokens [B] and stores them with their logprobs in
              a `Round` of arrays [S, B].
    record    The host copies each Round into arrays [B, R] and frees the slots whose response has ended
              with a stop token or at its limit. When all samples of a prompt have ended, they are
              returned as `Rollouts` of arrays [samples, …]. `Flight.stop` ends the call early; a later
              call continues what it returns.

Files, in reading order:

    engine    `Sampler`, the public interface and its compiled programs
    flight    the host side of one call: queue, slots, records
    groups    the samples of a prompt, assembled from the tokens of the slots
    slots     the device side: prefill, admission, resizing, decoding
    token     `SamplingParams`, filters, and sampling one token from logits
    rollouts  `Rollouts`, the result
    sizes     the few shapes that programs are compiled for
    rehearsal the device calls for responses of known lengths, without a model
    checks    validation of the caller's arguments
    settings  the config section `sampler`

Keys and values of the sequences in flight lie in ring buffers, see `models.cache`.

Axis letters: B slots, P rows prefilled together, T tokens of a chunk, S decode steps per device call,
R response tokens, V vocabulary, D model width, K key/value heads, H head width.
"""

from drpo_jax.sampler.engine import Sampler
from drpo_jax.sampler.flight import Flight
from drpo_jax.sampler.rehearsal import Rehearsal, rehearse
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.token import SamplingParams

__all__ = ["Flight", "Rehearsal", "Rollouts", "Sampler", "SamplingParams", "rehearse"]
