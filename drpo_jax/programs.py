"""All compiled programs of a run.

Every function that a run executes on devices is built here from the config. `train`, `evaluate`,
`preflight`, the benchmarks and the tests all take their functions from `Programs`, so what one of
them measures or checks is what the others run.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drpo_jax import objectives
from drpo_jax.batches import Batches
from drpo_jax.config import boundary, flatten, objective_hyper, shared_hyper
from drpo_jax.learner import (
    PARTS,
    Batch,
    Policy,
    UpdateSettings,
    gradients,
    init_state,
    likelihood,
    make_optimizer,
    make_schedule,
    policy,
    response_trace,
    summarize,
    update,
)
from drpo_jax.models import Compute, ModelConfig, Transformer, check_heads
from drpo_jax.parallel import (
    SAMPLER_RULES,
    DeviceClock,
    make_sampler_mesh,
    resharding,
    shardings,
    with_shardings,
)
from drpo_jax.precision import MatmulRecipe, Recipe, get_recipe, multiplies_float8
from drpo_jax.sampler import Sampler, SamplingParams
from drpo_jax.sampler.checks import check_split
from drpo_jax.weights import perturb, sampler_weights

# The programs of a rollout step other than the samplers'.
STEP_PROGRAMS = (
    "sync", "sync_exact", "perturbed", "rescore", "policy_update", "summarize", "mismatch",
)  # fmt: skip


class Programs(Batches):
    """The jitted functions of a run, and the batches that they take.

    Call them inside `jax.set_mesh(mesh)`; the samplers enter their own mesh themselves. Axis letters: N
    sequences of a batch, P rows that hold them, T tokens of a row, R response tokens. Weights, gradients
    and traces are float32.

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
        from `key`, in the formats of the recipe, on the sampler's mesh.
      sync_exact(model): the same without quantization and without noise, for exact evaluation.
      perturbed(model, key): the learner's model with the noise that `sync` draws from `key`.

    Samplers, with jitted programs of their own (see `Sampler.programs`):
      sampler: the rollout sampler, which follows the precision recipe.
      exact_sampler: the Sampler of exact evaluation, which follows none.

    Attributes:
      sampler_mesh: the mesh of the samplers, see `parallel.make_sampler_mesh`.
      clock: the `DeviceClock` of the programs of a rollout step and of the samplers.
      model_config: the architecture.
      objective: the `Policy` that the updates maximize.
      hyper: the objective's numbers that the updates take as inputs, by name; none unless
        compute.shared_programs is set.
      policy_settings: the `UpdateSettings` of the policy's updates.
      sampling_params: the `SamplingParams` of the rollouts.
      optimizer, sft_optimizer: optax optimizers of the policy and of supervised learning.
      state_shardings: the shardings of the policy's TrainState.
      abstract_state, abstract_sft_state: both TrainStates as ShapeDtypeStructs with shardings.
      abstract_weights: the result of `sync` as ShapeDtypeStructs with shardings.
      supervised_updates: number of supervised updates; the schedule spans them.

    Args:
      config: a resolved config.
      mesh: from `parallel.make_mesh`.
      stop: token ids that end a response.
      supervised_updates: number of updates of supervised learning; None: sft.steps.

    Raises:
      ValueError: the mesh does not divide a batch or the heads, or the sampler's mesh does not divide
        its slots or the heads of its caches.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        stop: Iterable[int],
        supervised_updates: int | None = None,
    ):
        self.model_config = model_config(config)
        self.sampler_mesh = make_sampler_mesh(mesh, **config.sampler_mesh)
        check_split(self.model_config, config.sampler.slots, self.sampler_mesh)
        check_heads(self.model_config, mesh)
        super().__init__(config, mesh)
        steps = config.sft.steps
        self.supervised_updates = steps if supervised_updates is None else supervised_updates
        self.objective = _objective(config)
        self.sampling_params = SamplingParams(
            max_tokens=config.sampler.max_response_length,
            samples=config.train.samples,
            temperature=config.sampler.temperature,
            top_k=config.sampler.top_k,
            top_p=config.sampler.top_p,
            stop=tuple(stop),
            top_logprobs=config.sampler.top_logprobs,
            routes=config.train.routing_replay,
        )
        recipe, compute = _recipe(config, mesh), _compute(config, mesh)
        self._build_states()
        self._build_updates(recipe.learner, compute)
        self._build_supervised(recipe.learner, compute)
        self._build_sampling(recipe.sampler, compute)
        self._watch()
        self._bind()

    def for_config(self, config: ConfigDict) -> "Programs":
        """Returns these programs, compiled only once, for another config.

        Args:
          config: a resolved config with compute.shared_programs. It differs from that of these programs
            only in the fields that no program is compiled for: `seed`, `data.init_from`,
            optimizer.learning_rate, and the numbers of the objective.

        Raises:
          ValueError: it differs in another field.
        """
        free = {"seed", "data.init_from", "optimizer.learning_rate", "objective.threshold"}
        free |= {f"objective.{name}" for name in shared_hyper(config) if name in self.hyper}
        old, new = flatten(self.config), flatten(config)
        if differing := [name for name in new if name not in free and new[name] != old.get(name)]:
            raise ValueError(
                f"programs compiled for one config do not fit another: {', '.join(differing)}"
            )
        programs = copy.copy(self)
        programs.config = config
        programs._bind()
        return programs

    def _bind(self):
        """Binds the config's numbers to the programs that take them as inputs."""
        self.hyper = shared_hyper(self.config)
        if self.config.compute.shared_programs:
            peak = np.float32(self.config.optimizer.learning_rate)
            self.policy_update = _Bound(_unbound(self.policy_update), peak=peak)
            self.mismatch = _Bound(_unbound(self.mismatch), delta=np.float32(boundary(self.config)))

    def _watch(self):
        """Makes the clock track the programs of a rollout step."""
        self.clock = DeviceClock()
        for name in STEP_PROGRAMS:
            setattr(self, name, self.clock.watch(getattr(self, name)))
        for sampler in (self.sampler, self.exact_sampler):
            sampler.programs = {n: self.clock.watch(p) for n, p in sampler.programs.items()}

    def _build_states(self):
        """The model, its optimizers, and the programs that make a TrainState."""
        config, train, sft = self.config, self.config.train, self.config.sft
        updates = train.steps * train.epochs * self.updates_per_epoch
        self._new_optimizer = partial(make_optimizer, config.optimizer, updates)
        self._new_schedule = partial(make_schedule, config.optimizer, updates)
        self.optimizer = self._new_optimizer()
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
            micro_batches=self.micro_batches,
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

        def policy_update(state, batch, peak=None):
            return update(
                state,
                batch,
                settings=self.policy_settings,
                optimizer=self._new_optimizer(peak),
                schedule=self._new_schedule(peak),
            )

        self.policy_update = jax.jit(
            policy_update, donate_argnums=0, out_shardings=(self.state_shardings, None)
        )
        squares = config.objective.baseline == "otb"
        scored = dataclasses.replace(self.policy_settings, sum_squares=squares)
        self.rescore = jax.jit(partial(response_trace, settings=scored))
        self.gradients = jax.jit(
            partial(gradients, settings=gradient_settings),
            out_shardings=(self.state_shardings.model, None, None),
        )
        self.summarize = jax.jit(summarize)
        if config.compute.shared_programs:
            self.mismatch = jax.jit(objectives.mismatch_summary)
        else:
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
            mesh=self.sampler_mesh,
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
        try:
            target = shardings(self.sampler_mesh, converted, SAMPLER_RULES)
        except ValueError as error:
            raise ValueError(f"sampler_mesh: {error}") from None
        # Convert in the learner's layout first, so that devices exchange narrow values.
        steps = [
            [start, *resharding(start, end, array.shape)]
            for start, end, array in zip(*map(jax.tree.leaves, (source, target, converted)))
        ]

        def sync(model, *key):
            arrays, structure = jax.tree.flatten(convert(change(model, *key)))
            moved = [reduce(jax.lax.with_sharding_constraint, *pair) for pair in zip(steps, arrays)]
            return jax.tree.unflatten(structure, moved)

        return jax.jit(sync, out_shardings=target), with_shardings(converted, target)


def model_config(config: ConfigDict) -> ModelConfig:
    """Returns the architecture that `config.model` describes."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in config.model.items() if name in fields})


def _objective(config: ConfigDict) -> Policy:
    section = config.objective
    penalty: dict[str, Any] = {"kl_behavior": section.kl_behavior}
    if section.kl in ("k2", "k3"):  # k1 is subtracted from the reward instead
        penalty |= {"kl": section.kl, "kl_coefficient": section.kl_coefficient}
    inputs = shared_hyper(config)
    constants = {n: v for n, v in objective_hyper(config).items() if n not in inputs}
    return policy(section.name, shared=inputs, **penalty | constants)


class _Bound(partial):
    """A jitted function with some arguments bound; they are inputs of the program, not constants."""

    def lower(self, *args: Any, **keywords: Any) -> Any:
        return self.func.lower(*args, **self.keywords, **keywords)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)


def _unbound(function: Any) -> Any:
    return function.func if isinstance(function, _Bound) else function


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
