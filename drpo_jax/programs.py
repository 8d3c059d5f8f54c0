"""All compiled programs of a run.

Every function that a run executes on devices is built here from the config. `train`, `evaluate`,
`preflight`, the benchmarks and the tests all take their functions from `Programs`, so what one of
them measures or checks is what the others run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drpo_jax import objectives
from drpo_jax.config import boundary, has_warm_start, objective_hyper
from drpo_jax.learner import (
    PARTS,
    Batch,
    Layout,
    Policy,
    UpdateSettings,
    gradients,
    init_state,
    lay_out,
    lay_out_by_tokens,
    likelihood,
    make_batch,
    make_optimizer,
    make_schedule,
    policy,
    response_trace,
    summarize,
    update,
)
from drpo_jax.models import Compute, ModelConfig, Transformer
from drpo_jax.parallel import (
    SAMPLER_RULES,
    DeviceClock,
    batch_shards,
    named_sharding,
    shardings,
    with_shardings,
)
from drpo_jax.precision import MatmulRecipe, Recipe, get_recipe, multiplies_float8
from drpo_jax.sampler import Rollouts, Sampler, SamplingParams
from drpo_jax.sampler.checks import check_split
from drpo_jax.weights import perturb, sampler_weights

# The programs of a rollout step other than the samplers'.
STEP_PROGRAMS = (
    "sync", "sync_exact", "perturbed", "rescore", "policy_update", "summarize", "mismatch",
)  # fmt: skip


class Programs:
    """The jitted functions of a run. Call them inside `jax.set_mesh(mesh)`.

    Axis letters: N sequences of a batch, P rows that hold them, T tokens of a row, R response tokens,
    L layers, k experts per token. Weights, gradients and traces are float32.

    Learner programs:
      init(key): a TrainState for supervised learning, sharded.
      begin(model): the same for supervised learning that starts from `model`.
      restart(model): the TrainState of a policy run that begins with `model`.
      supervised_update(state, batch), policy_update(state, batch): one optimizer update of a
        mini-batch [P, T]. Both donate `state`. Returns: (TrainState, `learner.Report`).
      likelihood(model, batch): Σ log p of the tokens of a supervised batch that carry a loss, and their
        number, as (float32, int32) scalars.
      rescore(model, batch): the TokenTrace [P, T] of the response tokens, without an objective and
        without gradients; with Σπ² under objective.baseline = "otb".
      gradients(model, batch): the gradient of one micro-batch whose `inputs` are the score
        coefficients c of its tokens. It is the gradient of any objective and of nothing else (no
        entropy bonus, no load balancing). Returns: (pytree like `model`, TokenTrace [P, T], metrics).
      summarize(trace, batch): metrics of an update, see `learner.summarize`.
      mismatch(full_logp, old_logp, logp, advantage, mask): metrics of the train–inference mismatch
        from [N, R] arrays, see `objectives.mismatch_summary`.

    Weight sync:
      sync(model, key): the weights of the rollout sampler: with the noise of precision.noise drawn
        from `key`, in the formats of the recipe, in the sampler's layout on the mesh.
      sync_exact(model): the same without quantization and without noise, for exact evaluation.
      perturbed(model, key): the learner's model with the noise that `sync` draws from `key`.

    Samplers, with jitted programs of their own (see `Sampler.programs`):
      sampler: the rollout sampler, which follows the precision recipe.
      exact_sampler: the Sampler of exact evaluation, which follows none.

    Attributes:
      clock: the `DeviceClock` of the programs of a rollout step and of the samplers.
      config, mesh, model_config: what the programs are built from.
      objective: the `Policy` that the updates maximize.
      policy_settings: the `UpdateSettings` of the policy's updates.
      sampling_params: the `SamplingParams` of the rollouts.
      optimizer, sft_optimizer: optax optimizers of the policy and of supervised learning.
      state_shardings: the shardings of the policy's TrainState.
      abstract_state, abstract_sft_state: both TrainStates as ShapeDtypeStructs with shardings.
      abstract_weights: the result of `sync` as ShapeDtypeStructs with shardings.
      supervised_updates: number of supervised updates; the schedule spans them.
      supervised_width: tokens of a row of supervised learning.
      sequences_per_update: N of a policy update.
      update_shape: (P, T) of a policy update with `sequences_per_update` sequences.
      micro_batch: rows of a micro-batch of a policy update.
      updates_per_epoch: mini-batches of a rollout.

    Args:
      config: a resolved config.
      mesh: from `parallel.make_mesh`.
      stop: token ids that end a response.
      supervised_updates: number of updates of supervised learning; None: sft.steps.

    Raises:
      ValueError: the mesh does not divide a batch or the sampler's caches.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        stop: Iterable[int],
        supervised_updates: int | None = None,
    ):
        self.config, self.mesh = config, mesh
        steps, sampler = config.sft.steps, config.sampler
        self.supervised_updates = steps if supervised_updates is None else supervised_updates
        self.supervised_width = config.sft.max_length or (
            sampler.max_prompt_length + sampler.max_response_length
        )
        self.model_config = model_config(config)
        check_split(self.model_config, config.sampler.slots, mesh)
        train = config.train
        self.sequences_per_update = train.mini_batch_prompts * train.samples
        self.updates_per_epoch = train.prompts // train.mini_batch_prompts
        self._build_shapes()
        self.objective = _objective(config)
        self.sampling_params = SamplingParams(
            max_tokens=config.sampler.max_response_length,
            samples=train.samples,
            temperature=config.sampler.temperature,
            top_k=config.sampler.top_k,
            top_p=config.sampler.top_p,
            stop=tuple(stop),
            top_logprobs=config.sampler.top_logprobs,
            routes=train.routing_replay,
        )
        recipe, compute = _recipe(config, mesh), _compute(config, mesh)
        self._build_states()
        self._build_updates(recipe.learner, compute)
        self._build_supervised(recipe.learner, compute)
        self._build_sampling(recipe.sampler, compute)
        self._watch()

    def _watch(self):
        """Makes the clock track the programs of a rollout step."""
        self.clock = DeviceClock()
        for name in STEP_PROGRAMS:
            setattr(self, name, self.clock.watch(getattr(self, name)))
        for sampler in (self.sampler, self.exact_sampler):
            sampler.programs = {n: self.clock.watch(p) for n, p in sampler.programs.items()}

    def _build_shapes(self):
        """Sets the shapes of the policy's updates and checks that the mesh divides all batches."""
        train, sampler, shards = self.config.train, self.config.sampler, batch_shards(self.mesh)
        width = sampler.max_prompt_length + sampler.max_response_length
        self.micro_batch = train.micro_batch
        if has_warm_start(self.config):
            self._check_batch("sft.micro_batch")
        if not train.micro_tokens:
            self._check_batch("train.micro_batch")
            self.update_shape = self.sequences_per_update, width
            return
        width = -(-width // PARTS[-1]) * PARTS[-1]
        if train.micro_tokens < shards * width:
            raise ValueError(
                f"train.micro_tokens = {train.micro_tokens} is too small: each of the {shards} devices "
                f"over which the mesh {dict(self.mesh.shape)} splits a batch (data · fsdp · expert) "
                f"needs a row of {width} tokens (prompt and response, rounded up to a multiple of "
                f"{PARTS[-1]}). Set at least {shards * width}, or 0 with train.micro_batch"
            )
        largest = min(train.micro_tokens // width, self.sequences_per_update + shards - 1)
        self.micro_batch = largest // shards * shards
        micro_batches = -(-self.sequences_per_update // self.micro_batch)
        self.update_shape = micro_batches * self.micro_batch, width

    def _build_states(self):
        """The model, its optimizers, and the programs that make a TrainState."""
        config, train, sft = self.config, self.config.train, self.config.sft
        updates = train.steps * train.epochs * self.updates_per_epoch
        self.optimizer = make_optimizer(config.optimizer, updates)
        self._schedule = make_schedule(config.optimizer, updates)
        sft_optimizer = ConfigDict(config.optimizer)
        sft_optimizer.update(
            learning_rate=sft.learning_rate,
            warmup_steps=sft.warmup_steps,
            schedule="linear",
            final_fraction=0.1,
        )
        self.sft_optimizer = make_optimizer(sft_optimizer, self.supervised_updates)
        self._sft_schedule = make_schedule(sft_optimizer, self.supervised_updates)

        def new_model(key):
            return Transformer(self.model_config, key)

        def abstract_state(optimizer):
            state = jax.eval_shape(partial(init_state, optimizer=optimizer), self._abstract_model)
            return with_shardings(state, shardings(self.mesh, state))

        self._abstract_model = jax.eval_shape(new_model, jax.random.key(0))
        self.abstract_state = abstract_state(self.optimizer)
        self.abstract_sft_state = abstract_state(self.sft_optimizer)
        self.state_shardings = _shardings_of(self.abstract_state)
        self._sft_shardings = _shardings_of(self.abstract_sft_state)
        self.init = jax.jit(
            lambda key: init_state(new_model(key), self.sft_optimizer),
            out_shardings=self._sft_shardings,
        )
        self.begin = jax.jit(
            lambda model: init_state(model, self.sft_optimizer), out_shardings=self._sft_shardings
        )
        self.restart = jax.jit(
            lambda model: init_state(model, self.optimizer), out_shardings=self.state_shardings
        )

    def _build_updates(self, recipe: MatmulRecipe, compute: Compute):
        """The policy's programs on batches: updates, rescoring, gradients, and their metrics."""
        config, train = self.config, self.config.train
        pack = train.pack or train.micro_tokens > 0
        shared = dict(
            horizon=config.objective.horizon,
            load_balance=config.model.load_balance,
            compute=dataclasses.replace(compute, matmul=recipe, one_segment=not pack),
        )
        self.policy_settings = UpdateSettings(
            objective=self.objective,
            aggregation=config.objective.aggregation,
            micro_batches=self.update_shape[0] // self.micro_batch,
            temperature=config.sampler.temperature,
            entropy_bonus=config.objective.entropy_bonus,
            pack=pack,
            parts=PARTS if train.micro_tokens else (1,),
            **shared,
        )
        gradient_settings = UpdateSettings(
            objective=_by_coefficient,
            aggregation=config.objective.aggregation,
            temperature=config.sampler.temperature,
            **shared | {"load_balance": 0.0},
        )
        self.policy_update = jax.jit(
            partial(
                update,
                settings=self.policy_settings,
                optimizer=self.optimizer,
                schedule=self._schedule,
            ),
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
        )
        squares = config.objective.baseline == "otb"
        scored = dataclasses.replace(self.policy_settings, sum_squares=squares)
        self.rescore = jax.jit(partial(response_trace, settings=scored))
        self.gradients = jax.jit(
            partial(gradients, settings=gradient_settings),
            out_shardings=(self.state_shardings.model, None, None),
        )
        self.summarize = jax.jit(summarize)
        self.mismatch = jax.jit(partial(objectives.mismatch_summary, delta=boundary(config)))

    def _build_supervised(self, recipe: MatmulRecipe, compute: Compute):
        """The programs of supervised learning on batches."""
        config, sft = self.config, self.config.sft
        packed = config.train.pack or sft.pack
        settings = UpdateSettings(
            objective=likelihood,
            aggregation="token-mean",
            horizon=config.objective.horizon,
            micro_batches=sft.batch // sft.micro_batch,
            load_balance=config.model.load_balance,
            pack=sft.pack,
            compute=dataclasses.replace(compute, matmul=recipe, one_segment=not packed),
        )
        self.supervised_update = jax.jit(
            partial(
                update,
                settings=settings,
                optimizer=self.sft_optimizer,
                schedule=self._sft_schedule,
            ),
            donate_argnums=0,
            out_shardings=(self._sft_shardings, None),
        )
        self.likelihood = jax.jit(partial(_likelihood, settings=settings))

    def _build_sampling(self, recipe: MatmulRecipe, compute: Compute):
        """Weight sync and two samplers: one for rollouts, which follows `recipe`, and an exact one."""
        config = self.config
        noise = partial(perturb, noise=config.precision.noise)
        self.perturbed = jax.jit(noise, out_shardings=self.state_shardings.model)
        self.sync, self.abstract_weights = self._weight_sync(recipe, compute, noise)
        exact = get_recipe("none").sampler
        self.sync_exact, _ = self._weight_sync(exact, compute, lambda model: model)
        new_sampler = partial(
            Sampler,
            None,
            slots=config.sampler.slots,
            decode_steps=config.sampler.decode_steps,
            prompt_length=config.sampler.max_prompt_length,
            prefill_chunk=config.sampler.prefill_chunk,
        )

        def sampling(recipe):
            # The weights arrive quantized: what remains of the recipe concerns activations.
            matmul = dataclasses.replace(recipe, weight=None, gradient=None)
            return dataclasses.replace(compute, matmul=matmul, remat="none", unroll=1)

        self.sampler = new_sampler(
            compute=sampling(recipe), float8_cache=config.precision.kv_cache == "e4m3"
        )
        self.exact_sampler = new_sampler(compute=sampling(exact))

    def _weight_sync(self, recipe: MatmulRecipe, compute: Compute, change: Callable):
        """The jitted weight sync of a sampler, and its result as ShapeDtypeStructs with shardings.

        Args:
          change: (model, …) → the model that is converted. The sync has the same arguments.
        """
        codes = self.config.precision.sampler_weights == "codes"
        convert = partial(sampler_weights, recipe=recipe, dtype=compute.dtype, codes=codes)
        converted = jax.eval_shape(convert, self._abstract_model)
        source = shardings(self.mesh, converted)
        target = shardings(self.mesh, converted, SAMPLER_RULES)

        def sync(model, *key):
            # Convert in the learner's layout first, so that devices exchange narrow values.
            return jax.lax.with_sharding_constraint(convert(change(model, *key)), source)

        return jax.jit(sync, out_shardings=target), with_shardings(converted, target)

    def batch(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        inputs: Mapping[str, np.ndarray],
        pack: bool = False,
        routes: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> tuple[Batch, Layout]:
        """Returns N sequences as a Batch on the mesh, with rows split over the batch axes.

        Args:
          tokens: int32 [N, T], prompt and response without a gap.
          prompt_lengths, response_lengths: int32 [N], tokens.
          inputs: name → [N] or [N, R, …], see `learner.Batch`.
          pack: lay out the sequences as in policy updates: by `train.micro_tokens` if it is set, or
            several per row if `train.pack` is set.
          routes: int16 [N, T, L, k], see `learner.Batch`.
          loss_mask: bool [N, R], the response tokens that carry a loss; None: all of them.

        Returns:
          The Batch, and the Layout that maps its rows back to sequences.
        """
        train, micro_batches = self.config.train, self.policy_settings.micro_batches
        lengths = prompt_lengths, response_lengths
        if pack and train.micro_tokens:
            layout = lay_out_by_tokens(*lengths, self.update_shape, micro_batches)
        else:
            layout = lay_out(*lengths, tokens.shape[1], pack and train.pack, micro_batches)
        return self._on_mesh(make_batch(layout, tokens, inputs, routes, loss_mask)), layout

    def supervised_batch(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        loss_mask: np.ndarray | None = None,
    ) -> Batch:
        """Returns N = sft.batch examples as a Batch on the mesh, packed if `sft.pack` is set.

        Args:
          tokens: int32 [N, supervised_width], prompt and response without a gap.
          prompt_lengths, response_lengths: int32 [N], tokens; 1 and 0 for rows without an example.
          loss_mask: bool [N, R], the response tokens that carry a loss; None: all of them.
        """
        sft = self.config.sft
        layout = lay_out(
            prompt_lengths,
            response_lengths,
            width=tokens.shape[1],
            pack=sft.pack,
            micro_batches=sft.batch // sft.micro_batch,
        )
        return self._on_mesh(make_batch(layout, tokens, {}, loss_mask=loss_mask))

    def _on_mesh(self, batch: Batch) -> Batch:
        """Places a batch of NumPy arrays; every process places the rows that its own devices hold."""
        rows = named_sharding(self.mesh, ("batch",))
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, rows, a.__getitem__), batch
        )

    def rollout_batch(
        self,
        rollouts: Rollouts,
        rows: np.ndarray,
        inputs: Mapping[str, np.ndarray],
        replay: bool = True,
        loss_mask: np.ndarray | None = None,
    ) -> tuple[Batch, Layout]:
        """Returns `batch` for some rows of a rollout.

        Args:
          rollouts: all N sequences.
          rows: int [n], the sequences to take.
          inputs: name → [N] or [N, R, …], for all sequences.
          replay: include the sampler's routes if `train.routing_replay` is set.
          loss_mask: bool [N, R], the tokens that carry a loss, for all sequences; None: the tokens that
            the model sampled.
        """
        loss_mask = rollouts.mask() if loss_mask is None else loss_mask
        replay = replay and self.config.train.routing_replay
        return self.batch(
            rollouts.tokens[rows],
            rollouts.prompt_lengths[rows],
            rollouts.response_lengths[rows],
            {name: values[rows] for name, values in inputs.items()},
            pack=True,
            routes=rollouts.routes[rows] if replay else None,
            loss_mask=loss_mask[rows],
        )

    def _check_batch(self, field):
        section, name = field.split(".")
        size, shards = self.config[section][name], batch_shards(self.mesh)
        if size % shards:
            raise ValueError(
                f"{field} = {size} is not a multiple of the {shards} devices over which the mesh "
                f"{dict(self.mesh.shape)} splits a batch (data · fsdp · expert)"
            )


def model_config(config: ConfigDict) -> ModelConfig:
    """Returns the architecture that `config.model` describes."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in config.model.items() if name in fields})


def _objective(config: ConfigDict) -> Policy:
    section = config.objective
    penalty: dict[str, Any] = {"kl_behavior": section.kl_behavior}
    if section.kl in ("k2", "k3"):  # k1 is subtracted from the reward instead
        penalty |= {"kl": section.kl, "kl_coefficient": section.kl_coefficient}
    return policy(section.name, **penalty | objective_hyper(config))


def _recipe(config: ConfigDict, mesh: Mesh) -> Recipe:
    section = config.precision
    native = section.recipe == "tensorwise" and multiplies_float8(mesh.devices.flat[0])
    return get_recipe(section.recipe, section.scale, section.gradient, native=native)


def _compute(config: ConfigDict, mesh: Mesh) -> Compute:
    """Returns how both sides compute, apart from the recipe's matmuls."""
    return Compute(
        dtype=config.compute.dtype,
        remat=config.compute.remat,
        unroll=config.compute.unroll,
        platform=mesh.devices.flat[0].platform,
        grouped_matmul=config.compute.grouped_matmul,
        attention=config.compute.attention,
    )


def _likelihood(model: Transformer, batch: Batch, settings: UpdateSettings):
    trace = response_trace(model, batch, settings=settings)
    return jnp.sum(trace.logp), jnp.sum(batch.mask > 0)


def _shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def _by_coefficient(logp, coefficient):
    """(J, c, w) for coefficients that are inputs of the batch; w is not needed."""
    return coefficient * logp, coefficient, jnp.ones_like(logp)
