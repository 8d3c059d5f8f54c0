"""The loop itself: `train` runs it, `rl_step` is one rollout and its updates."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax.checkpoint import Checkpoints, last_complete
from drpo_jax.config import claim_workdir
from drpo_jax.errors import Interrupted, bad_input
from drpo_jax.evaluation import evaluate
from drpo_jax.interrupts import AbandonStep
from drpo_jax.learner import TrainState
from drpo_jax.learner.record import save_rollout
from drpo_jax.lock import hold
from drpo_jax.loop import console, guard, parity
from drpo_jax.loop.collector import Collector
from drpo_jax.loop.learn import make_loss_mask, make_updates, objective_inputs
from drpo_jax.loop.profile import Profiler, parse_steps
from drpo_jax.loop.rollout import Example, Rollout, below, replayed, training_reward
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.loop.warm_start import initial_model
from drpo_jax.metrics import CompileClock, MetricLogger, Record, read_metrics, record_start
from drpo_jax.models import Transformer
from drpo_jax.objectives import by_token, informative
from drpo_jax.parallel import multihost
from drpo_jax.run import Run, claim, due

PROBLEMS = "problems"  # Prefix of the problem stream's arrays in a checkpoint.


def train(
    config: FrozenConfigDict, workdir: Path, replay: Path | None = None, profile: str = ""
) -> tuple[Record, Record] | None:
    """Makes the warm start, then RL. Resumes the run in `workdir`; does nothing if it is complete.

    Args:
      config: a resolved config.
      workdir: directory of the run.
      replay: directory of rollout files to learn from instead of sampling, see `learner.replay`.
      profile: the steps to trace, see `profile.parse_steps`.

    Returns:
      The records of the evaluations before and after training, {"step": …} for one that is missing from
      `metrics.jsonl`; None on all processes but the first.

    Raises:
      BadInput: the config, the problems or the workdir do not fit together.
      TrainingStopped: updates are no longer finite, or sampler and learner disagree.
      Interrupted: SIGTERM or Ctrl-C stopped the run after it saved its state.
    """
    profiler = Profiler(parse_steps(profile, config.train.steps), workdir)
    done = _completed(config, workdir)
    if done is not None:
        with bad_input(), hold(workdir):
            multihost.on_main("claim the workdir", partial(claim_workdir, workdir, config))
        if multihost.process_count() > 1:
            jax.devices()  # All processes start the backend together; process 0 plots with it.
        print(f"{workdir}: this run is complete (step {done} of {config.train.steps})")
        print(f"--config.train.steps={2 * done} would continue it to step {2 * done}")
    else:
        with claim(Run.create(config, workdir, replay=replay)) as run:
            print(console.introduction(run), flush=True)
            _train(run, profiler)
        if text := console.compilations(read_metrics(workdir)):
            print(f"\n{text}")
    if not multihost.is_main():
        return None
    evaluations = {
        record["step"]: record for record in read_metrics(workdir) if "eval/avg" in record
    }
    last = done if done is not None and done > config.train.steps else config.train.steps
    before, after = (evaluations.get(step, {"step": step}) for step in (0, last))
    return before, after


def _completed(config: FrozenConfigDict, workdir: Path) -> int | None:
    """Returns the last step of the run in `workdir`; None if something is left to do."""
    done = last_complete(workdir / "checkpoints")
    if done is None or done < config.train.steps:
        return None
    with bad_input():
        return done if _unevaluated(config, workdir, done) is None else None


def _train(run: Run, profiler: Profiler) -> None:
    """Runs the steps from the last checkpoint to train.steps."""
    config, total = run.config, run.config.train.steps
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(contextlib.ExitStack())  # Exits after the checkpoints.
        stack.enter_context(jax.set_mesh(run.mesh))
        stack.callback(run.writer.wait)
        stack.callback(profiler.close)
        checkpoints = stack.enter_context(run.checkpoints())
        run, state, collector, start = _start(run, checkpoints)
        profiler.skipped(start)
        record_start(run.workdir, start, run.changes)
        with bad_input():
            unevaluated = {} if start == 0 else _unevaluated(config, run.workdir, start)
            logged = checkpoints.logged(start) if start else None
            first = start if unevaluated is not None else start + 1
            log = MetricLogger(run.workdir, total, first, config=config, expected=logged)
        outer.callback(log.end_tracking)
        stack.enter_context(log)
        print(f"\ncolumns\n{log.legend()}\n", flush=True)
        clock = CompileClock()
        if unevaluated is not None:
            metrics = unevaluated | _evaluate(run, state.model)
            if run.interrupts.requested():
                raise _interrupted(run, checkpoints)
            log.log(start, metrics)
            if start:
                checkpoints.add_metrics(start, metrics)
            else:
                checkpoints.save(0, state, metrics, log.synchronize(), _pending(run, collector))
        saved, skipped, seconds, mixed = int(state.updates), int(state.skipped), math.inf, True
        for step in range(start + 1, total + 1):
            run.interrupts.expect(seconds)
            try:
                first = step == start + 1
                with profiler.step(step):
                    state, metrics, example = rl_step(run, collector, state, step - 1, first=first)
            except AbandonStep:
                if not skipped and checkpoints.latest_step() != step - 1:
                    pending = _pending(run, collector)
                    checkpoints.save(step - 1, state, {}, log.synchronize(), pending)
                raise _interrupted(run, checkpoints) from None
            seconds, skipped, last = metrics["time/step"], int(state.skipped), step == total
            most = int(metrics["updates/skipped_in_a_row"])
            stuck = guard.too_many_skipped(run, most, step) or (skipped > 0 and last)
            if not stuck and (last or due(step, config.evaluate.every)):
                metrics |= _evaluate(run, state.model)
            evaluated, stopping = "eval/avg" in metrics, run.interrupts.requested()
            if stuck or stopping or last or evaluated or due(step, config.log.every):
                log.log(step, metrics | clock.read())
            mixed = _show(run, log, step, example, metrics, mixed)
            if stuck:
                guard.stop(run, most, step, checkpoints, confirmed=int(state.updates) > saved)
            if not skipped and (
                stopping or last or evaluated or due(step, config.checkpoint.every)
            ):
                checkpoints.save(step, state, metrics, log.synchronize(), _pending(run, collector))
                saved = int(state.updates)
            if stopping:
                raise _interrupted(run, checkpoints)


def _unevaluated(config: FrozenConfigDict, workdir: Path, step: int) -> Record | None:
    """Returns the metrics of a step whose evaluation is due but was prevented by a signal, or None."""
    if step != config.train.steps and not due(step, config.evaluate.every):
        return None
    records = [record for record in read_metrics(workdir) if record["step"] == step]
    overdue = bool(records) and "eval/avg" not in records[-1]
    # The first process decides for all, and rewrites the file only after all have read it.
    if not multihost.gather("evaluation that is due", overdue=overdue)[0]["overdue"]:
        return None
    return {name: value for name, value in records[-1].items() if name != "step"} if overdue else {}


def _evaluate(run: Run, model: Transformer) -> dict[str, float]:
    """Measures held-out accuracy; returns {} if a signal prevents it.

    The next start makes up for it, so an evaluation is never worth a part of the grace period.
    """
    run.interrupts.expect()
    try:
        run.interrupts.check()
        return evaluate(run, model)
    except AbandonStep:
        return {}


def _interrupted(run: Run, checkpoints: Checkpoints) -> Interrupted:
    """Returns the exception that ends the run after a signal."""
    step, total = checkpoints.latest_step(), run.config.train.steps
    return run.interrupts.error(
        "no step is complete yet"
        if step is None
        else f"the run is saved after step {step} of {total}"
    )


def _show(
    run: Run,
    log: MetricLogger,
    step: int,
    example: Example,
    metrics: Record,
    mixed: bool,
) -> bool:
    """Prints a response now and then, and at the first step without a gradient.

    Args:
      mixed: whether a group of the step before had mixed rewards.

    Returns:
      Whether one of this step had.
    """
    was_mixed, mixed = mixed, metrics["reward/informative_groups"] > 0
    if was_mixed and not mixed:
        print(console.no_gradient(step, example), flush=True)
    if due(step, run.config.log.samples_every):
        print(text := console.show_example(step, example), flush=True)
        log.log_text("sample", text, step)
    return mixed


def _start(run: Run, checkpoints: Checkpoints) -> tuple[Run, TrainState, Collector, int]:
    """Returns the state from which the run continues.

    Returns:
      The run with its KL reference, the policy's state, the collector, and the number of completed
      steps.
    """
    collector = Collector()
    latest = checkpoints.restore_latest(run.programs.abstract_state)
    if latest is None:
        print("initializing the model …", flush=True)
        state, step = run.programs.restart(initial_model(run)), 0
    else:
        step, state = latest
        pending = checkpoints.pending(step)
        if (stream := below(pending, PROBLEMS)) and run.train_problems is not None:
            run.train_problems.restore(stream)
        own = {n: a for n, a in pending.items() if not n.startswith(f"{PROBLEMS}.")}
        collector = Collector.restore(own)
        print(f"resuming after step {step} of {run.config.train.steps}", flush=True)
    if run.config.objective.kl != "none":
        # A separate copy, because the updates donate the arrays of the state.
        run = dataclasses.replace(run, reference=initial_model(run))
    return run, state, collector, step


def _save(run: Run, step: int, rollout: Rollout, view: Mapping[str, np.ndarray]) -> None:
    """Saves a rollout and the arrays that the learner computed for it, see `learner.record`."""
    arrays = rollout.arrays(run.tokenizer, run.config.train.samples)
    save_rollout(run.workdir, step, **arrays, **view)


def _pending(run: Run, collector: Collector) -> dict[str, np.ndarray]:
    """Returns the states of the collector and the problem stream for a checkpoint."""
    assert run.train_problems is not None  # None only in an evaluation
    stream = run.train_problems.state()
    return collector.state() | {f"{PROBLEMS}.{name}": array for name, array in stream.items()}


def rl_step(
    run: Run, collector: Collector, state: TrainState, step: int, first: bool = False
) -> tuple[TrainState, dict[str, float], Example]:
    """Collects one rollout, or reads it from the files of a replay, and runs its updates.

    Args:
      collector: provides the rollout, and owns what is sampled for later steps.
      state: donated.
      step: number of completed steps, which the random keys depend on. Logs and files call this one
        step + 1.
      first: whether this is the first step of the process, which announces compilations and compares
        the sampler's logprobs with the learner's (sampler.parity).

    Returns:
      The new state, the metrics (host scalars), and one of the responses.
    """
    config = run.config
    timer = PhaseTimer(console.notices(run) if first else {}, run.programs.clock.idle_seconds)
    if run.replay is None:
        rollout = collector.collect(run, state.model, step, timer)
    else:
        rollout = replayed(run, step, timer)
    responses = rollout.responses
    with timer("update"):
        measure = parity.is_measured(config, step)
        # Older rollouts are compared at the time of sampling, with the weights of that time. The files
        # of a replay may have been sampled with other weights than those of this run.
        sampled_now = not config.train.staleness and run.replay is None
        check = first and config.sampler.parity != "off" and sampled_now
        reward = training_reward(config, rollout, step)
        with jax.profiler.TraceAnnotation("score"):
            inputs, old_logp, penalties = objective_inputs(
                run, state.model, responses, reward, step, measure or check, rollout.advantage
            )
            scores = rollout.scores
            if (measure or check) and sampled_now:
                scores = parity.score_at_sampling(run, state.model, responses, step, step, old_logp)
        if check and scores:
            parity.check_parity(run, responses, scores)
        loss_mask = make_loss_mask(config, responses, rollout.loss_mask)
        state, trace, learned = make_updates(
            run, state, responses, inputs, loss_mask, step, keep=measure
        )
        metrics = learned | penalties
        if measure:
            metrics |= parity.mismatch(
                run, responses, scores, old_logp, trace["logp"], inputs, loss_mask
            )
    if due(step, config.train.save_rollout_every) and multihost.is_main():
        view = trace | {name: inputs[name] for name in ("behavior_logp", "advantage")}
        view |= {"old_logp": old_logp, "loss_mask": loss_mask}
        run.writer.submit(partial(_save, run, step + 1, rollout, view))
    metrics |= rollout.metrics() | rollout.staleness(step) | timer.metrics()
    metrics["tokens_per_second"] = responses.response_lengths.sum() / metrics["time/step"]
    if config.train.overlong_filtering:
        metrics["response/filtered"] = 1 - loss_mask.any(axis=1).mean()
    mixed = informative(by_token(inputs["advantage"]) * loss_mask, config.train.samples)
    metrics["reward/informative_groups"] = float(np.mean(mixed))
    return state, metrics, rollout.example(run.tokenizer)
