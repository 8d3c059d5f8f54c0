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

from drpo_jax import objectives
from drpo_jax.config import objective_hyper
from drpo_jax.learner import (
    Batch,
    UpdateSettings,
    init_state,
    likelihood,
    make_optimizer,
    policy,
    response_logp,
    update,
)
from drpo_jax.models import Compute, ModelConfig, Transformer
from drpo_jax.parallel import RULES, SAMPLER_RULES, batch_shards, named_sharding
from drpo_jax.precision import Quantized, dequantize, get_recipe, quantize_weight
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
      rescore(model, batch): TokenTrace of a rollout, without gradients.
      summarize(trace, batch): metric pairs and extremes over a rollout.
      sync(model), sync_exact(model): the sampler's weights, as the recipe has them or unquantized.
      sampler, exact_sampler: the `Sampler` of the rollouts and that of evaluation.

    Raises:
      ValueError: batches that the mesh does not divide.
    """

    def __init__(self, config, mesh, stop):
        self.config, self.mesh = config, mesh
        self.model_config = model_config(config)
        self._check_batches()
        recipe = get_recipe(config.precision.recipe, config.precision.scale)
        compute = Compute(
            dtype=config.compute.dtype,
            remat=config.compute.remat,
            unroll=config.compute.unroll,
            platform=mesh.devices.flat[0].platform,
            grouped_matmul=config.compute.grouped_matmul,
        )
        learner = dataclasses.replace(compute, matmul=recipe.learner)
        train, sft = config.train, config.sft
        updates = train.steps * train.epochs * (train.prompts // train.mini_batch_prompts)
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.sft_optimizer = make_optimizer(
            _SftOptimizer(config.optimizer, sft.learning_rate, sft.warmup_steps), sft.steps
        )
        self.objective_hyper = objective_hyper(config)
        hyper = dict(
            aggregation=config.objective.aggregation,
            horizon=config.objective.horizon,
            temperature=config.sampler.temperature,
            load_balance=config.model.load_balance,
            compute=learner,
        )
        sequences = train.mini_batch_prompts * train.samples
        policy_settings = UpdateSettings(
            objective=policy(config.objective.name, **self.objective_hyper),
            micro_batches=sequences // train.micro_batch,
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
        self.rescore = jax.jit(partial(response_logp, settings=policy_settings))
        self.summarize = jax.jit(
            partial(_summarize, name=config.objective.name, hyper=self.objective_hyper)
        )
        codes = config.precision.sampler_weights == "codes"
        self.sync, sampling = self._sync(abstract, recipe.sampler, compute, codes)
        self.sync_exact, exact = self._sync(abstract, get_recipe("none").sampler, compute, codes)
        new_sampler = partial(
            Sampler,
            None,
            slots=config.sampler.slots,
            decode_steps=config.sampler.decode_steps,
            prompt_length=config.sampler.max_prompt_length,
        )
        self.sampler, self.exact_sampler = new_sampler(compute=sampling), new_sampler(compute=exact)
        self.sampling_params = SamplingParams(
            max_tokens=config.sampler.max_response_length,
            samples=train.samples,
            temperature=config.sampler.temperature,
            top_k=config.sampler.top_k,
            top_p=config.sampler.top_p,
            stop=tuple(stop),
        )

    def _sync(self, abstract, recipe, compute, codes):
        """The jitted weight sync for a sampler recipe, and how its sampler computes."""
        convert = partial(sampler_weights, recipe=recipe, dtype=compute.dtype, codes=codes)
        placed = shardings(self.mesh, jax.eval_shape(convert, abstract), SAMPLER_RULES)
        # The weights are quantized by now: what is left of the recipe concerns the activations.
        matmul = dataclasses.replace(recipe, weight=None, gradient=None)
        return (
            jax.jit(convert, out_shardings=placed),
            dataclasses.replace(compute, matmul=matmul, remat="none", unroll=1),
        )

    def batch(self, tokens, prompt_lengths, response_lengths, behavior_logp, advantage) -> Batch:
        """A Batch on the mesh, its rows split over the batch axes."""
        arrays = (tokens, prompt_lengths, response_lengths, behavior_logp, advantage)
        return Batch(*jax.device_put(arrays, named_sharding(self.mesh, ("batch",))))

    def _check_batches(self):
        shards = batch_shards(self.mesh)
        for field in ("train.micro_batch", "sft.micro_batch", "sampler.slots"):
            room, name = field.split(".")
            size = self.config[room][name]
            if size % shards:
                raise ValueError(
                    f"{field} = {size} is not a multiple of the {shards} devices over which the mesh "
                    f"{dict(self.mesh.shape)} splits a batch (data · fsdp · expert)"
                )
        samples = max(self.config.train.samples, self.config.evaluate.samples)
        if self.config.sampler.slots < samples * shards:
            raise ValueError(
                f"sampler.slots = {self.config.sampler.slots}: on each of the {shards} devices over "
                f"which the mesh splits a batch, the {samples} samples of a prompt have to fit; at "
                f"least {samples * shards}"
            )


class _SftOptimizer:
    """The optimizer's fields with the warm start's learning rate, which falls linearly to a tenth."""

    schedule, final_fraction = "linear", 0.1

    def __init__(self, optimizer, learning_rate, warmup_steps):
        self._optimizer = optimizer
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def model_config(config) -> ModelConfig:
    """The architecture that `config.model` describes."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in config.model.items() if name in fields})


def sampler_weights(model, *, recipe, dtype, codes):
    """The model as the sampler runs it: projections quantized, embedding and head cast to `dtype`.

    Router and norms stay float32. With `codes`, quantized weights are `Quantized` (float8 in memory,
    expanded at every use); without, the values that the codes stand for.
    """

    def convert(path, weight):
        name, value = path[-1].name, weight[...]
        if name.endswith("_proj") and recipe.weight is not None:
            quantized = quantize_weight(value, recipe)
            return weight.replace(quantized if codes else dequantize(quantized, dtype))
        keep = name.endswith("norm") or name == "router"
        return weight if keep else weight.replace(value.astype(dtype))

    return jax.tree_util.tree_map_with_path(convert, model, is_leaf=_is_param)


def shardings(mesh, tree, rules=RULES):
    """The sharding of every array of `tree`: parameters by their logical axes, the rest replicated.

    The scales of a quantized weight lie as its codes do, where the mesh divides them.
    """

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


def _summarize(trace, batch, *, name, hyper):
    """(name → (sum, count), name → extreme, weight [B, R]) over the response tokens of a rollout."""
    advantage = batch.advantage[:, None]
    mask = batch.response_mask()
    weight = objectives.gradient_weight(name, trace.logp, batch.behavior_logp, advantage, **hyper)
    pairs, extremes = objectives.weight_summary(
        weight, trace.logp, batch.behavior_logp, trace.coefficient, mask
    )
    pairs = pairs | {"entropy": (jnp.sum(trace.entropy * mask), jnp.sum(mask))}
    return pairs, extremes, weight
