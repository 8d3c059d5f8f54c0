"""The one list of compiled programs of a run: everything that it executes on devices is built here.

train, evaluate, benchmarks and tests take their functions from `Programs`, so what one of them
measures or checks is what the others run.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from drpo_jax import objectives
from drpo_jax.config import boundary, objective_hyper
from drpo_jax.learner import (
    UpdateSettings,
    gradients,
    init_state,
    lay_out,
    likelihood,
    make_batch,
    make_optimizer,
    policy,
    response_trace,
    update,
)
from drpo_jax.models import Compute, ModelConfig, Transformer
from drpo_jax.parallel import RULES, SAMPLER_RULES, batch_shards, check_mesh, named_sharding
from drpo_jax.precision import (
    Quantized,
    dequantize,
    get_recipe,
    multiplies_float8,
    quantize_weight,
)
from drpo_jax.sampler import Sampler, SamplingParams


class Programs:
    """The jitted functions of a run. Call them inside `jax.set_mesh(mesh)`.

    Args:
      config: a resolved config.
      mesh: from `parallel.make_mesh`.
      stop: token ids that end a response.

    Attributes:
      init(key): a new TrainState for supervised learning, sharded.
      supervised_update(state, batch), policy_update(state, batch): one optimizer update.
      restart(model): the TrainState of a policy run that begins with `model`.
      rescore(model, batch): TokenTrace of the response tokens, without an objective or gradients.
      gradients(model, batch): (grads, TokenTrace [P, T], metrics) of one micro-batch whose `inputs` are
        the score coefficient c of every token: of any objective, and of nothing else (no entropy
        bonus, no load balancing).
      summarize(trace, batch): metric pairs and extremes over a rollout, and w [P, T].
      mismatch(full_logp, old_logp, logp, advantage, mask): pairs and extremes, [N, R] arrays.
      objective: the `Policy` that is trained with.
      sync(model, key), sync_exact(model): the sampler's weights, as the recipe has them (and with
        precision.noise drawn from the key), or unquantized and without noise.
      perturbed(model, key): the learner's model with the noise that `sync` draws from the key.
      sampler, exact_sampler: the `Sampler` of the rollouts and that of evaluation.
      abstract_weights: what `sync` gives the sampler, as ShapeDtypeStructs.

    Raises:
      ValueError: batches that the mesh does not divide.
    """

    def __init__(self, config, mesh, stop):
        self.config, self.mesh = config, mesh
        self.model_config = model_config(config)
        self._check_batches()
        fp8 = config.precision
        native = fp8.recipe == "tensorwise" and multiplies_float8(mesh.devices.flat[0])
        recipe = get_recipe(fp8.recipe, fp8.scale, fp8.gradient, native=native)
        compute = Compute(
            dtype=config.compute.dtype,
            remat=config.compute.remat,
            unroll=config.compute.unroll,
            platform=mesh.devices.flat[0].platform,
            grouped_matmul=config.compute.grouped_matmul,
            attention=config.compute.attention,
        )
        learner = dataclasses.replace(
            compute, matmul=recipe.learner, one_segment=not config.train.pack
        )
        train, sft = config.train, config.sft
        updates = train.steps * train.epochs * (train.prompts // train.mini_batch_prompts)
        self.optimizer = make_optimizer(config.optimizer, updates)
        sft_optimizer = ConfigDict(config.optimizer)
        sft_optimizer.update(
            learning_rate=sft.learning_rate,  # which falls to a tenth
            warmup_steps=sft.warmup_steps,
            schedule="linear",
            final_fraction=0.1,
        )
        self.sft_optimizer = make_optimizer(sft_optimizer, sft.steps)
        penalty = {}
        if config.objective.kl in ("k2", "k3"):  # k1 is taken from the reward
            penalty = {"kl": config.objective.kl, "kl_coefficient": config.objective.kl_coefficient}
        self.objective = policy(config.objective.name, **penalty, **objective_hyper(config))
        hyper = dict(
            aggregation=config.objective.aggregation,
            horizon=config.objective.horizon,
            temperature=config.sampler.temperature,
            load_balance=config.model.load_balance,
            compute=learner,
        )
        sequences = train.mini_batch_prompts * train.samples
        self._policy_settings = policy_settings = UpdateSettings(
            objective=self.objective,
            micro_batches=sequences // train.micro_batch,
            entropy_bonus=config.objective.entropy_bonus,
            pack=train.pack,
            **hyper,
        )
        sft_settings = UpdateSettings(
            objective=likelihood,
            micro_batches=sft.batch // sft.micro_batch,
            **hyper | dict(aggregation="token-mean", temperature=1.0),
        )

        self._new_model = lambda key: Transformer(self.model_config, key)
        abstract = jax.eval_shape(self._new_model, jax.random.key(0))
        like = partial(jax.eval_shape, partial(init_state, optimizer=self.optimizer))
        sft_like = partial(jax.eval_shape, partial(init_state, optimizer=self.sft_optimizer))
        self.state_shardings = shardings(mesh, like(abstract))
        sft_shardings = shardings(mesh, sft_like(abstract))
        self.abstract_state = _with_shardings(like(abstract), self.state_shardings)
        self.abstract_sft_state = _with_shardings(sft_like(abstract), sft_shardings)

        self.init = jax.jit(
            lambda key: init_state(self._new_model(key), self.sft_optimizer),
            out_shardings=sft_shardings,
        )
        self.restart = jax.jit(
            lambda model: init_state(model, self.optimizer), out_shardings=self.state_shardings
        )
        self.supervised_update = jax.jit(
            partial(update, settings=sft_settings, optimizer=self.sft_optimizer),
            donate_argnums=0,
            out_shardings=(sft_shardings, None),
        )
        self.policy_update = jax.jit(
            partial(update, settings=policy_settings, optimizer=self.optimizer),
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
        )
        self.rescore = jax.jit(partial(response_trace, settings=policy_settings))
        looked_at = dataclasses.replace(
            policy_settings,
            objective=_by_coefficient,
            micro_batches=1,
            entropy_bonus=0.0,
            load_balance=0.0,
            pack=False,
        )
        self.gradients = jax.jit(
            partial(gradients, settings=looked_at),
            out_shardings=(self.state_shardings.model, None, None),
        )
        self.summarize = jax.jit(partial(_summarize, objective=self.objective))
        self.mismatch = jax.jit(partial(objectives.mismatch_summary, delta=boundary(config)))
        codes = config.precision.sampler_weights == "codes"
        noise = partial(perturb, noise=fp8.noise)
        self.sync, sampling, self.abstract_weights = self._sync(
            abstract, recipe.sampler, compute, codes, noise
        )
        exactly = get_recipe("none").sampler
        self.sync_exact, exact, _ = self._sync(
            abstract, exactly, compute, codes, lambda model: model
        )
        self.perturbed = jax.jit(noise, out_shardings=self.state_shardings.model)
        new_sampler = partial(
            Sampler,
            None,
            slots=config.sampler.slots,
            decode_steps=config.sampler.decode_steps,
            prompt_length=config.sampler.max_prompt_length,
            prefill_chunk=config.sampler.prefill_chunk,
        )
        self.sampler = new_sampler(compute=sampling, float8_cache=fp8.kv_cache == "e4m3")
        self.exact_sampler = new_sampler(compute=exact)
        self.sampling_params = SamplingParams(
            max_tokens=config.sampler.max_response_length,
            samples=train.samples,
            temperature=config.sampler.temperature,
            top_k=config.sampler.top_k,
            top_p=config.sampler.top_p,
            stop=tuple(stop),
            top_logprobs=config.sampler.top_logprobs,
            routes=config.train.routing_replay,
        )

    def _sync(self, abstract, recipe, compute, codes, change):
        """The jitted weight sync for a sampler recipe, how its sampler computes, and what it gets.

        Args:
          change: (model, …) → what is synced, with the arguments of the sync.
        """
        convert = partial(sampler_weights, recipe=recipe, dtype=compute.dtype, codes=codes)
        converted = jax.eval_shape(convert, abstract)
        placed = shardings(self.mesh, converted, SAMPLER_RULES)
        before = shardings(self.mesh, converted)

        def sync(model, *key):
            # Narrowed where it lies: what then travels has the sampler's dtype, not the masters'.
            return jax.lax.with_sharding_constraint(convert(change(model, *key)), before)

        # The weights are quantized by now: what is left of the recipe concerns the activations.
        matmul = dataclasses.replace(recipe, weight=None, gradient=None)
        return (
            jax.jit(sync, out_shardings=placed),
            dataclasses.replace(compute, matmul=matmul, remat="none", unroll=1),
            _with_shardings(converted, placed),
        )

    def batch(self, tokens, prompt_lengths, response_lengths, inputs, pack=False, routes=None):
        """N sequences as a Batch on the mesh, its rows split over the batch axes, and their Layout.

        Args:
          tokens: int32 [N, T], prompt and response without a gap.
          prompt_lengths, response_lengths: int32 [N].
          inputs: name → [N] or [N, R, …], see `learner.Batch`.
          pack: as `train.pack` says, for the policy's updates.
          routes: int16 [N, T, L, k], see `learner.Batch`.
        """
        layout = lay_out(
            prompt_lengths,
            response_lengths,
            width=tokens.shape[1],
            pack=pack and self.config.train.pack,
            micro_batches=self._policy_settings.micro_batches,
        )
        batch = make_batch(layout, tokens, inputs, routes)
        rows = named_sharding(self.mesh, ("batch",))
        # Every process places the rows that its own devices hold.
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, rows, a.__getitem__), batch
        ), layout

    def rollout_batch(self, rollouts, rows, inputs, replay=True):
        """`batch` of some rows of Rollouts and of the arrays that go with all of them.

        Args:
          replay: with the rollout's routes, where train.routing_replay is set.
        """
        replay = replay and self.config.train.routing_replay
        return self.batch(
            rollouts.tokens[rows],
            rollouts.prompt_lengths[rows],
            rollouts.response_lengths[rows],
            {name: values[rows] for name, values in inputs.items()},
            pack=True,
            routes=rollouts.routes[rows] if replay else None,
        )

    def _check_batches(self):
        shards = batch_shards(self.mesh)
        warm_start = ("sft.micro_batch",) if self.config.sft.steps else ()
        for field in ("train.micro_batch", *warm_start, "sampler.slots"):
            room, name = field.split(".")
            size = self.config[room][name]
            if size % shards:
                raise ValueError(
                    f"{field} = {size} is not a multiple of the {shards} devices over which the mesh "
                    f"{dict(self.mesh.shape)} splits a batch (data · fsdp · expert)"
                )
        model, tensor = self.model_config, self.mesh.shape["tensor"]
        for field in ("kv_heads", "linear_value_heads"):
            if getattr(model, field) % tensor:
                raise ValueError(
                    f"model.{field} = {getattr(model, field)} is not a multiple of mesh.tensor = "
                    f"{tensor}, over which the sampler's caches are split"
                )


def model_config(config) -> ModelConfig:
    """The architecture that `config.model` describes."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in config.model.items() if name in fields})


def perturb(model, key=None, *, noise):
    """The model with every weight but the norms' multiplied by 1 + noise · N(0, 1)."""
    if not noise:
        return model
    places = iter(range(1_000_000))

    def change(path, weight):
        draw = jax.random.normal(jax.random.fold_in(key, next(places)), weight.shape)
        norm = path[-1].name.endswith("norm")
        return weight if norm else weight.replace(weight[...] * (1 + noise * draw))

    return jax.tree_util.tree_map_with_path(change, model, is_leaf=_is_param)


def sampler_weights(model, *, recipe, dtype, codes):
    """The model as the sampler runs it: projections quantized, embedding and head cast to `dtype`, and
    the layers one by one.

    Router, norms and a DeltaNet's decay stay float32. With `codes`, quantized weights are `Quantized`
    (float8 in memory, expanded at every use); without, the values that the codes stand for.
    """

    def convert(path, weight):
        name, value = path[-1].name, weight[...]
        if name.endswith("_proj") and recipe.weight is not None:
            quantized = quantize_weight(value, recipe)
            return weight.replace(quantized if codes else dequantize(quantized, dtype))
        keep = name.endswith("norm") or name in ("router", "A_log", "dt_bias")
        return weight if keep else weight.replace(value.astype(dtype))

    return jax.tree_util.tree_map_with_path(convert, model, is_leaf=_is_param).unstacked()


def shardings(mesh, tree, rules=RULES):
    """The sharding of every array of `tree`: parameters by their logical axes, the rest replicated.

    The scales of a quantized weight lie as its codes do, where the mesh divides them.

    Raises:
      ValueError: the mesh is not one of `make_mesh`, or does not divide an axis.
    """
    check_mesh(mesh)

    def place(leaf):
        if not _is_param(leaf):
            return named_sharding(mesh, ())
        axes = leaf.get_metadata()["axes"]
        axes = ("layers",) * (jax.tree.leaves(leaf)[0].ndim - len(axes)) + axes
        if isinstance(leaf.get_value(), Quantized):
            codes, scales = leaf.get_value().codes, leaf.get_value().scales
            kept = [
                axis if axis and not scales.shape[i] % _parts(mesh, axis, rules) else None
                for i, axis in enumerate(axes)
            ]
            both = zip((codes, scales), (axes, kept))
            placed = [named_sharding(mesh, names, a.shape, rules) for a, names in both]
            return jax.tree.unflatten(jax.tree.structure(leaf), placed)
        return named_sharding(mesh, axes, leaf.shape, rules)

    return jax.tree.map(place, tree, is_leaf=_is_param)


def _parts(mesh, axis, rules):
    return math.prod(mesh.shape[a] for a in rules[axis])


def _with_shardings(tree, placed):
    leaves = zip(*(jax.tree.leaves(t) for t in (tree, placed)))
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_param(leaf):
    return isinstance(leaf, nnx.Param)


def _by_coefficient(logp, coefficient):
    """(J, c) with c as it is given."""
    return coefficient * logp, coefficient


def _summarize(trace, batch, *, objective):
    """(name → (sum, count), name → extreme, weight [P, T]) over the response tokens of a rollout."""
    inputs, mask = batch.inputs, batch.mask > 0
    behavior_logp, advantage = inputs["behavior_logp"], inputs["advantage"]
    known = inputs | {"mask": batch.mask, "topk_logp": trace.topk_logp}
    arrays = {name: known[name] for name in objectives.OBJECTIVES[objective.name].arrays}
    weight = objectives.gradient_weight(
        objective.name, trace.logp, behavior_logp, advantage, **arrays, **dict(objective.hyper)
    )
    pairs, extremes = objectives.weight_summary(
        weight, trace.logp, behavior_logp, advantage, trace.coefficient, mask
    )
    count = jnp.sum(mask)
    pairs = pairs | {"entropy": (jnp.sum(trace.entropy * mask), count)}
    if "correction" in inputs:
        pairs["correction/mean"] = jnp.sum(jnp.where(mask, inputs["correction"], 0.0)), count
        pairs["correction/dropped"] = jnp.sum(mask & (inputs["correction"] == 0)), count
    if "ref_logp" in inputs:
        k, _ = objectives.kl_penalty("k3", trace.logp, behavior_logp, inputs["ref_logp"])
        pairs["policy/kl_reference"] = jnp.sum(jnp.where(mask, k, 0.0)), count
    return pairs, extremes, jnp.where(mask, weight, 0.0)
