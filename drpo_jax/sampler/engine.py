"""Generation: jitted prefill and decode over a KV cache, in batches of a fixed number of slots.

Prompts lie right-aligned in the cache, so that all rows write the same slot at a decode step: a row's
rotary position is its own count, its slot the shared one. Each prompt is prefilled once and its cache
repeated for the samples of its group. The decode loop runs `decode_steps` tokens on the device per
host round trip; the cache grows between them, so that it is never read beyond a length bucket.

Axis letters: B rows (slots), P prompt slots, R response tokens, C cache slots in use (P and a bucket
of R), K key/value heads, H head width, L layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.models import KV, Compute
from drpo_jax.parallel import batch_shards, constrain
from drpo_jax.sampler.token import SamplingParams, sample_token


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Sampled responses; N = prompts · samples rows, the samples of a prompt next to each other.

    Attributes:
      tokens: int32 [N, P + R], prompt and response without a gap, zeros behind.
      prompt_lengths, response_lengths: int32 [N]; the stop token counts. Masks come from these, never
        from token ids.
      logp: float32 [N, R], logprob of each response token under the distribution it was sampled from
        (this is log µ); zeros behind the response.
      full_logp: float32 [N, R], the same at the same temperature without top-k and top-p.
      finished: bool [N], the response ended with a stop token (and was not cut at max_tokens).
      top_ids, top_logp: int32 and float32 [N, R, K], the most likely tokens of the full
        distribution at each step, the sampled one among them, K = SamplingParams.top_logprobs.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    logp: np.ndarray
    full_logp: np.ndarray
    finished: np.ndarray
    top_ids: np.ndarray
    top_logp: np.ndarray

    def __len__(self):
        return len(self.tokens)

    @classmethod
    def concatenate(cls, parts):
        """The rows of several Rollouts of the same shapes as one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def mask(self):
        """bool [N, R]: the response tokens."""
        return np.arange(self.logp.shape[1]) < self.response_lengths[:, None]

    def response(self, row):
        """Token ids of one response, the stop token left out."""
        start = self.prompt_lengths[row]
        end = start + self.response_lengths[row] - self.finished[row]
        return self.tokens[row, start:end].tolist()

    def pieces(self, tokenizer):
        """(ids int32 [U], texts unicode [U]) of the distinct response tokens, ids ascending."""
        rows, columns = np.nonzero(self.mask())
        ids = np.unique(self.tokens[rows, self.prompt_lengths[rows] + columns])
        return ids, np.array([tokenizer.decode([i]) for i in ids], dtype=str)

    def texts(self, tokenizer):
        """The responses as text (derived: the token ids are the record)."""
        return [tokenizer.decode(self.response(row)) for row in range(len(self))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch in flight.

    Attributes:
      caches: per layer KV of keys [B, K, H, C] and values [B, K, C, H], which the decode loop lets
        grow, or the state of a DeltaNet.
      tokens int32 [B, R], logp and full_logp float32 [B, R]: what was sampled so far.
      lengths: int32 [B], response tokens so far.
      done: bool [B].
      prompt_lengths: int32 [B].
      keys: PRNG key per row.
      top: (ids int32, logp float32) [B, R, K], or () where none are recorded.
      step: int32 scalar, tokens sampled by every row that is not done.
    """

    caches: tuple
    tokens: jax.Array
    logp: jax.Array
    full_logp: jax.Array
    lengths: jax.Array
    done: jax.Array
    prompt_lengths: jax.Array
    keys: jax.Array
    top: tuple
    step: jax.Array


def prefill(model, tokens_PxT, lengths, key, prompt_ids, *, params, compute):
    """Runs the prompts (right-aligned int32 [prompts, P]) and samples every row's first token.

    Row `prompt · samples + j` draws from the key folded with (prompt_ids[prompt], j), so its response
    depends neither on the number of slots nor on its neighbours.
    """
    width = tokens_PxT.shape[1]
    slots = jnp.arange(width)
    valid = slots >= width - lengths[:, None]
    positions = jnp.maximum(slots - (width - lengths[:, None]), 0)
    out = model.hidden(tokens_PxT, positions, valid.astype(jnp.int32), compute, cache=True)
    repeat = partial(jnp.repeat, repeats=params.samples, axis=0)
    logits = repeat(model.logits(out.hidden[:, -1], compute))

    def layer_cache(cache):
        if not isinstance(cache, KV):  # the state of a DeltaNet
            return jax.tree.map(repeat, cache)
        k_BxPxKxH, v_BxPxKxH = cache
        cache = KV(k_BxPxKxH.transpose(0, 2, 3, 1), v_BxPxKxH.transpose(0, 2, 1, 3))
        return jax.tree.map(lambda x: constrain(repeat(x), "batch", "kv_heads", None, None), cache)

    keys = jax.vmap(
        lambda prompt: jax.vmap(
            lambda sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
        )(jnp.arange(params.samples))
    )(prompt_ids).reshape(-1)
    rows = keys.shape[0]
    empty = jnp.zeros((rows, params.max_tokens))
    top = jnp.zeros((*empty.shape, params.top_logprobs))
    state = DecodeState(
        caches=tuple(layer_cache(cache) for cache in out.cache),
        tokens=empty.astype(jnp.int32),
        logp=empty,
        full_logp=empty,
        lengths=jnp.zeros((rows,), jnp.int32),
        done=repeat(lengths == 0),
        prompt_lengths=repeat(lengths),
        keys=keys,
        top=(top.astype(jnp.int32), top) if params.top_logprobs else (),
        step=jnp.zeros((), jnp.int32),
    )
    return _record(state, logits, params)


def decode(model, state, *, read, grow, params, compute):
    """Samples until `read` response tokens, or until all rows are done.

    Args:
      grow: slots by which the cache grows first; P + read then are in it.
    """

    def room(x, axis):
        return jnp.pad(x, [(0, grow if i == axis else 0) for i in range(4)])

    def grown(cache):
        return KV(room(cache.keys, 3), room(cache.values, 2)) if isinstance(cache, KV) else cache

    state = dataclasses.replace(state, caches=tuple(map(grown, state.caches)))
    width = next(c for c in state.caches if isinstance(c, KV)).keys.shape[-1] - read
    # Loop-invariant slices of the stacked weights: XLA's CPU backend copies them at every step.
    # Elsewhere they fuse into the matmuls, and taken apart here they would be a second copy.
    layers = model.layers() if compute.on_cpu() else None

    def step(state):
        index = width + state.step - 1
        slots = jnp.arange(width + read)
        mask = (slots >= width - state.prompt_lengths[:, None]) & (slots <= index)
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, 1, keepdims=False)
        positions = state.prompt_lengths + state.step - 1
        hidden, caches = model.decode(last, positions, state.caches, index, mask, compute, layers)
        state = dataclasses.replace(state, caches=caches)
        return _record(state, model.logits(hidden, compute), params)

    def going(state):
        return (state.step < read) & ~jnp.all(state.done)

    return jax.lax.while_loop(going, step, state)


def _record(state, logits, params):
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token, logp, full_logp, top = sample_token(logits, keys, params)

    def put(rows, new):
        done = state.done.reshape(-1, *[1] * (new.ndim - 1))
        new = jnp.where(done, 0, new)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(rows, new, state.step, 1)

    stopped = jnp.isin(token, jnp.array(params.stop, jnp.int32)) if params.stop else False
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, token),
        logp=put(state.logp, logp),
        full_logp=put(state.full_logp, full_logp),
        top=jax.tree.map(put, state.top, top),
        lengths=state.lengths + ~state.done,
        done=state.done | stopped,
        step=state.step + 1,
    )


def read_buckets(max_tokens, decode_steps):
    """Response lengths at which the cache grows (and the decode loop returns to the host), each a
    compilation: multiples of `decode_steps` up to eight, then doubling."""
    buckets = [min(decode_steps, max_tokens)]
    while buckets[-1] < max_tokens:
        grow = decode_steps if buckets[-1] < 8 * decode_steps else buckets[-1]
        buckets.append(min(buckets[-1] + grow, max_tokens))
    return buckets


def _rollouts(prompts, width, params, tokens, logp, full_logp, response_lengths, done, *top):
    """Rollouts of what the decode loop recorded for `params.samples` responses to each prompt."""
    lengths = np.repeat([len(p) for p in prompts], params.samples).astype(np.int32)
    rows = np.zeros((len(lengths), width + params.max_tokens), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = prompts[row // params.samples]
        rows[row, length : length + params.max_tokens] = tokens[row]
    if not top:
        top = np.zeros((*logp.shape, 0), np.int32), np.zeros((*logp.shape, 0), np.float32)
    return Rollouts(rows, lengths, response_lengths, logp, full_logp, done, *top)


class Sampler:
    """Generates responses with one model.

    Args:
      model: a `Transformer`; assign `sampler.model` to sample with new weights of the same shapes.
      slots: rows decoded at once.
      decode_steps: tokens per row between host round trips.
      prompt_length: slots for the prompt; a longer prompt is an error. Default: the longest prompt
        of a call, rounded up to 16 (which compiles anew when it grows).
      compute: how to compute.
    """

    def __init__(self, model, slots=64, decode_steps=16, prompt_length=None, compute=Compute()):
        self.model = model
        self.slots, self.decode_steps, self.prompt_length = slots, decode_steps, prompt_length
        self._prefill = jax.jit(partial(prefill, compute=compute), static_argnames=("params",))
        self._decode = jax.jit(
            partial(decode, compute=compute), static_argnames=("params", "read", "grow")
        )

    def compilations(self):
        """Programs compiled so far (bounded by 1 + the number of read buckets, per SamplingParams)."""
        return self._prefill._cache_size() + self._decode._cache_size()

    def generate(self, prompts, params: SamplingParams, key):
        """Samples `params.samples` responses to each prompt.

        Args:
          prompts: non-empty lists of token ids.
          params: SamplingParams.
          key: PRNG key; a prompt's responses depend on it, on the prompt's place in the list and on
            the sample's number, not on slots or batching.

        Returns:
          Rollouts, prompt-major.

        Raises:
          ValueError: an empty prompt, one longer than `prompt_length`, or a group that does not fit
            into the slots.
        """
        return Rollouts.concatenate(list(self.batches(prompts, params, key)))

    def batches(self, prompts, params: SamplingParams, key, first=0):
        """`generate` batch by batch: yields the Rollouts of the first prompts, of the next, …

        What the caller does with one batch need not wait for the others.

        Args:
          first: place of the first prompt in a longer list, of which these are a part.
        """
        width = self._check(prompts, params)
        per_batch = self._prompts_per_batch(params)
        for i in range(0, len(prompts), per_batch):
            some = prompts[i : i + per_batch]
            sampled = self._generate_batch(some, first + i, per_batch, width, params, key)
            yield _rollouts(some, width, params, *sampled)

    def _prompts_per_batch(self, params):
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else batch_shards(mesh)
        prompts = self.slots // params.samples // shards * shards
        if not prompts:
            where = f" on each of {shards} devices" if shards > 1 else ""
            raise ValueError(
                f"{params.samples} samples of a prompt{where} do not fit into "
                f"{self.slots} slots; raise the sampler's slots or lower the samples"
            )
        return prompts

    def _check(self, prompts, params):
        if not prompts:
            raise ValueError("no prompts to sample from")
        lengths = [len(p) for p in prompts]
        limit = self.prompt_length or -(-max(lengths) // 16) * 16
        for i, length in enumerate(lengths):
            if not 0 < length <= limit:
                raise ValueError(
                    f"prompt {i} has {length} tokens; it must have between 1 and {limit} "
                    "(the sampler's prompt length)"
                )
        return limit

    def _generate_batch(self, prompts, first, per_batch, width, params, key):
        tokens = np.zeros((per_batch, width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
        lengths = np.array([len(p) for p in prompts] + [0] * (per_batch - len(prompts)), np.int32)
        ids = first + np.arange(per_batch, dtype=np.int32)
        state = self._prefill(self.model, tokens, lengths, key, ids, params=params)
        buckets = read_buckets(params.max_tokens, self.decode_steps)
        for filled, read in zip([0, *buckets], buckets):
            state = self._decode(self.model, state, read=read, grow=read - filled, params=params)
            if np.all(state.done):
                break
        rows = len(prompts) * params.samples
        out = (state.tokens, state.logp, state.full_logp, state.lengths, state.done, *state.top)
        return tuple(np.asarray(x)[:rows] for x in jax.device_get(out))
