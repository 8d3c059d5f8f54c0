"""What the phases of a run share, and how a workdir is bound to one run."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import FrozenConfigDict

from drpo_jax import data, rewards
from drpo_jax.checkpoint import Checkpoints, saved_steps
from drpo_jax.config import changed_fields, claim_workdir, from_json, has_warm_start, to_json
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.interrupts import Interrupts
from drpo_jax.lock import hold
from drpo_jax.metrics import check_tracking
from drpo_jax.models import Transformer
from drpo_jax.parallel import make_mesh, multihost
from drpo_jax.problems import encode, load, same_problems
from drpo_jax.programs import Programs
from drpo_jax.run_checks import check_config, check_plugins, check_same, check_vocabulary
from drpo_jax.sampler import Rollouts, Sampler, SamplingParams
from drpo_jax.storage import BackgroundWriter, path_of
from drpo_jax.supervised import Examples, recorded_updates
from drpo_jax.supervised import load as load_examples

if TYPE_CHECKING:  # PyArrow takes time to import, and only replays need it.
    from drpo_jax.learner.replay import Replay

# Purposes of random keys: `Run.key` folds the step and then the purpose into the seed's key.
INIT, SAMPLE, EVALUATE, SHUFFLE, NOISE, DRAW = range(6)


@dataclasses.dataclass(frozen=True)
class Group:
    """The responses to one problem.

    Attributes:
      index: position of the problem in the list of problems.
      rollouts: the responses as `Rollouts` with params.samples rows.
      texts: the responses as text; [] if another process verifies them.
      rewards: their rewards, which may still be in flight; None if another process verifies them.
    """

    index: int
    rollouts: Rollouts
    texts: list[str]
    rewards: rewards.Pending | None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Problems, reward, mesh and programs of a run; `Run.create` makes one from a config.

    Attributes:
      config: the resolved config.
      workdir: directory of the run.
      tokenizer: encodes prompts and decodes responses.
      reward: the verifier, a row of `rewards.REWARDS`.
      train_problems: the stream of training problems; None for an evaluation.
      heldout: the problems to evaluate on.
      examples: the examples of the warm start; None: the task's demonstrations, or no warm start.
      report: what was dropped when the problems were loaded, see `problems.load`; may be "".
      mesh: the device mesh.
      programs: the functions that the run compiles.
      replay: the rollout files to learn from instead of sampling; None: the run samples.
      reference: the model that a KL penalty refers to; None without a penalty.
      writer: writes saved rollouts, which are complete before the next checkpoint is committed.
      check_owner: raises if another process owns the workdir; see `claim`.
      interrupts: the signals that ask the run to stop; see `claim`.
      changes: the config fields that changed since the last start, {path: [old, new]}; on the first
        process only.
    """

    config: FrozenConfigDict
    workdir: Path
    tokenizer: Any
    reward: rewards.Reward
    train_problems: data.ProblemStream | data.Curriculum | None
    heldout: Sequence[data.Problem]
    report: str
    mesh: jax.sharding.Mesh
    programs: Programs
    replay: "Replay | None" = None
    examples: Examples | None = None
    reference: Transformer | None = None
    writer: BackgroundWriter = dataclasses.field(default_factory=BackgroundWriter)
    check_owner: Callable[[], None] = lambda: None
    interrupts: Interrupts = Interrupts()
    changes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        config: FrozenConfigDict,
        workdir: Path,
        train: bool = True,
        replay: Path | None = None,
        programs: Programs | None = None,
    ) -> "Run":
        """Loads the problems, makes the mesh and builds the programs, without compiling them.

        Args:
          config: a resolved config.
          workdir: directory of the run; nothing is written there.
          train: False for an evaluation, which needs no training problems.
          replay: directory of rollout files to learn from instead of sampling.
          programs: those of an earlier run that fit the config, see `Programs.for_config`; None: new
            ones.

        Raises:
          BadInput: the problems, the warm start, the mesh or the files do not fit the config.
        """
        if train:
            check_tracking(config.log.wandb)
        with bad_input():
            check_config(config)
            tokenizer = data.make_tokenizer(config.data, config.model.path)
            check_vocabulary(config, tokenizer)
            loaded = load(config, tokenizer, train)
            if multihost.process_count() > 1:
                check_same("the problems", loaded.digest())
            reward = rewards.get_reward(config.reward.name, config.reward.extract)
            check_plugins(config, reward, loaded.heldout)
            stream = None
            if train and loaded.train is not None:
                stream = _stream(config, loaded.train)
            _check_init_from(config)
            learns = train and has_warm_start(config) and not config.data.init_from
            examples = load_examples(config, tokenizer) if learns else None
            if programs is None:
                mesh = make_mesh(**config.mesh)
                updates = examples.updates if examples else None
                programs = Programs(config, mesh, tokenizer.stop_ids, supervised_updates=updates)
            files = None if replay is None else _open_replay(programs, reward, replay)
        return cls(
            config=config,
            workdir=workdir,
            tokenizer=tokenizer,
            reward=reward,
            train_problems=stream,
            heldout=loaded.heldout,
            examples=examples,
            report=loaded.report,
            mesh=programs.mesh,
            programs=programs,
            replay=files,
        )

    def key(self, step: int, purpose: int) -> jax.Array:
        """Returns the PRNG key for one purpose at one step.

        With precision.noise_fixed, that of the sampler's noise is the same at all steps.
        """
        if purpose == NOISE and self.config.precision.noise_fixed:
            step = 0
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        return jax.random.fold_in(key, purpose)

    @property
    def evaluation_key(self) -> jax.Array:
        """The PRNG key of every evaluation, so that evaluations differ in the weights only."""
        return self.key(0, EVALUATE)

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of RL."""

        def before_commit():
            self.writer.wait()
            self.check_owner()

        return _open_checkpoints(self.config, self.workdir, to_json(self.config), before_commit)

    def warm_start_checkpoints(self) -> Checkpoints:
        """The checkpoints of the warm start: this run's own, or those of data.init_from."""
        source = self.config.data.init_from
        if source:
            return _open_checkpoints(self.config, path_of(source) / "sft")
        config = to_json(self.config)
        return _open_checkpoints(self.config, self.workdir / "sft", config, self.check_owner)

    def sample(
        self,
        sampler: Sampler,
        problems: Sequence[data.Problem],
        params: SamplingParams,
        key: jax.Array,
        places: Sequence[int] | None = None,
    ) -> Iterator[Group]:
        """Samples responses to problems and starts verifying each group once it is complete.

        Verification runs while the remaining problems are sampled. Each process verifies a contiguous
        share of the problems.

        Args:
          sampler: the sampler, with weights loaded.
          problems: the problems to respond to.
          params: how to sample; each problem gets params.samples responses.
          key: PRNG key.
          places: position of each problem in a longer list, if `problems` is a part of one.

        Yields:
          One `Group` per problem, in the order in which they are completed.

        Raises:
          AbandonStep: a signal stops the run, and what samples would take too long.
        """
        check_every = max(len(problems) // 16, 1)
        prompts = encode(self.config, self.tokenizer, problems)
        own = multihost.share(range(len(problems)))
        stream = sampler.stream(prompts, params, key, places)
        for count, (index, rollouts) in enumerate(stream):
            if count % check_every == 0:
                self.interrupts.check()
            yield self.verification(index, problems[index], rollouts, index in own)

    def verification(
        self, index: int, problem: data.Problem, rollouts: Rollouts, own: bool
    ) -> Group:
        """Starts verifying the responses to a problem, if this process is responsible for it.

        Args:
          index: index of the group.
          problem: the problem.
          rollouts: all responses to it.
          own: whether this process verifies them; False if another one does.
        """
        if not own:
            return Group(index, rollouts, [], None)
        texts = rollouts.texts(self.tokenizer)
        questions, answers = [problem.prompt] * len(texts), [problem.answer] * len(texts)
        tokens = _token_texts(rollouts, self.tokenizer) if self.reward.per_token else None
        pending = rewards.submit(self.reward, questions, texts, answers, tokens)
        return Group(index, rollouts, texts, pending)


def _stream(config, problems) -> data.ProblemStream | data.Curriculum:
    """Returns the stream of training problems; a curriculum if the config sets a window."""
    stream, section = data.ProblemStream(problems, config.seed), config.data
    if (section.window_low, section.window_high) == (0, 1):
        return stream
    return data.Curriculum(stream, section.window_low, section.window_high, section.window_rest)


@contextlib.contextmanager
def claim(run: Run) -> Iterator[Run]:
    """Owns the workdir, binds it to the run's config and problems, and notes signals.

    Yields:
      The run, whose checkpoints are committed only while it is the owner.

    Raises:
      BadInput: the workdir holds another run, or another process is running in it.
    """

    from drpo_jax.learner.replay import check_source

    changes = {}

    def write():
        begun = bool(saved_steps(run.workdir / "checkpoints"))
        check_source(run.workdir, run.replay is not None, begun)
        changes.update(changed_fields(run.workdir, run.config))
        claim_workdir(run.workdir, run.config)
        if run.replay is not None:
            run.replay.claim(run.workdir)
        if run.report:
            keep_report(run.report, run.workdir / "problems.txt")

    with contextlib.ExitStack() as stack:
        with bad_input():
            check_owner = stack.enter_context(hold(run.workdir))
            multihost.on_main("claim the workdir", write)
            if run.replay is not None:
                digests = json.dumps(dict(run.replay.digests))
                check_same(f"{run.replay.directory}: rollout files", digests)
            if run.examples:
                check_same("the examples of supervised learning", run.examples.digest())
        interrupts = stack.enter_context(Interrupts.noted(run.config.checkpoint.grace_seconds))
        yield dataclasses.replace(
            run, check_owner=check_owner, interrupts=interrupts, changes=changes
        )


def due(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`.

    Args:
      step: number of completed steps.
      every: interval in steps; 0: never.
    """
    return bool(every) and step % every == 0


def keep_report(report: str, path: Path) -> None:
    """Writes the report of `problems.load` into the workdir, unless it is already there.

    Raises:
      BadInput: the file holds another report, because the run began with other problems.
    """
    if path.exists() and not same_problems(path.read_text(), report):
        raise BadInput(
            f"the problems are no longer those that the run began with (listed in {path}): restore "
            "them, or choose another --workdir"
        )
    path.write_text(report)
    print(f"{report.strip().splitlines()[-1]} ({path})")


def _token_texts(rollouts: Rollouts, tokenizer: Any) -> list[list[str]]:
    """Returns the text of each token of each response, including its stop token."""
    rows = [
        rollouts.tokens[i, start : start + length].tolist()
        for i, (start, length) in enumerate(
            zip(rollouts.prompt_lengths, rollouts.response_lengths, strict=True)
        )
    ]
    texts = {token: tokenizer.decode([token]) for row in rows for token in row}
    return [[texts[token] for token in row] for row in rows]


def _open_checkpoints(config, directory, *of_a_run):
    """Opens the checkpoints below a directory; to save any, pass what `Checkpoints` needs of a run."""
    options = config.checkpoint
    return Checkpoints(directory / "checkpoints", options.keep, options.best_metric, *of_a_run)


def _open_replay(programs: Programs, reward: rewards.Reward, directory: Path) -> "Replay":
    """Opens the files to learn from; raises ValueError if they do not fit the config."""
    from drpo_jax.learner.replay import Replay, check_advantages, check_replayable
    from drpo_jax.learner.rollout_checks import Limits

    config = programs.config
    check_replayable(config, "topk_logp" in programs.objective.arrays, reward.per_token)
    replay = Replay.open(directory, Limits.of(config), config.train.prompts)
    if replay.advantages:
        check_advantages(config, replay.per_token)
    return replay


def _check_init_from(config):
    """Raises BadInput if data.init_from does not name a finished warm start."""
    source = config.data.init_from
    if not source:
        return
    with _open_checkpoints(config, path_of(source) / "sft") as checkpoints:
        step = checkpoints.latest_step()
    if step is None:
        raise BadInput(
            f"data.init_from = {source!r}: there is no checkpoint of a warm start below it; give the "
            "workdir of a run of drpo_jax.sft or drpo_jax.train"
        )
    total = recorded_updates(path_of(source) / "sft")
    if total is None:
        total = from_json((path_of(source) / "config.json").read_text()).sft.steps
    if step < total:
        raise BadInput(
            f"data.init_from = {source!r}: its warm start is at step {step} of {total}; let it "
            "finish first"
        )
