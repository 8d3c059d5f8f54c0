"""The model that RL starts from, and the supervised learning that may produce it."""

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax import data
from drpo_jax.config import has_warm_start
from drpo_jax.errors import DamagedCheckpoint, bad_input
from drpo_jax.learner import Batch, Report, TrainState
from drpo_jax.loop import guard
from drpo_jax.metrics import CompileClock, MetricLogger
from drpo_jax.models import Transformer, from_pretrained
from drpo_jax.parallel import multihost, shardings
from drpo_jax.run import INIT, Run
from drpo_jax.supervised import Example


def initial_model(run: Run) -> Transformer:
    """Returns the model that RL starts from.

    The first of these applies: the weights of the warm start in data.init_from; the weights of the
    run's own warm start, which runs now if it does not exist; the weights in model.path; random
    weights.
    """
    model = existing_model(run)
    if model is not None:
        return model
    if has_warm_start(run.config):
        return make_warm_start(run)
    return random_model(run)


def existing_model(run: Run) -> Transformer | None:
    """Returns `initial_model` if its weights exist, in a finished warm start or in model.path."""
    config = run.config
    if not config.data.init_from and not has_warm_start(config):
        return _pretrained(run) if config.model.path else None
    with bad_input(), run.warm_start_checkpoints() as checkpoints:
        step = checkpoints.latest_step()
        if step is None or not (config.data.init_from or step == run.programs.supervised_updates):
            return None
        try:
            like = {"model": run.programs.abstract_sft_state.model}
            return checkpoints.restore(step, like)["model"]
        except DamagedCheckpoint:
            if config.data.init_from:
                raise
            return None  # `make_warm_start` continues from an older checkpoint.


def random_model(run: Run) -> Transformer:
    """Returns the randomly initialized model that a run without other weights starts from."""
    return run.programs.init(run.key(0, INIT)).model


def _pretrained(run: Run) -> Transformer:
    """Returns the model in model.path."""
    with bad_input():
        place = partial(shardings, run.mesh)
        return from_pretrained(run.config.model.path, shardings=place)[0]


def _first_state(run: Run) -> TrainState:
    """Returns the state that supervised learning starts from: model.path, or random weights."""
    if run.config.model.path:
        return run.programs.begin(_pretrained(run))
    return run.programs.init(run.key(0, INIT))


def make_warm_start(run: Run) -> Transformer:
    """Learns from the examples, or from the task's demonstrations; resumes from the last checkpoint.

    Returns:
      The model after `programs.supervised_updates` updates.

    Raises:
      BadInput: the examples differ from those that the warm start began with.
      TrainingStopped: too many updates in a row were not finite.
    """
    programs, total = run.programs, run.programs.supervised_updates
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(contextlib.ExitStack())  # Exits after the checkpoints.
        if run.examples:
            with bad_input():
                claim = partial(run.examples.claim, run.workdir / "sft")
                multihost.on_main("claim the examples", claim)
            print(run.examples.report())
        checkpoints = stack.enter_context(run.warm_start_checkpoints())
        latest = checkpoints.restore_latest(programs.abstract_sft_state)
        step, state = latest or (0, _first_state(run))
        if step == total:
            return state.model
        log = stack.enter_context(_logger(run, checkpoints, step))
        outer.callback(log.end_tracking)
        clock, saved = CompileClock(), int(state.updates)
        save_every = max(total // 4, 1)
        noun = "examples" if run.examples else "demonstrations"
        phase = "learning" if run.examples else "warm start"
        print(f"supervised {phase}: {total} updates of {run.config.sft.batch} {noun}")
        print("compiling the supervised update …", flush=True)
        if step == 0 and (heldout := heldout_loss(run, state.model)):
            log.log(0, heldout)
        while step < total:
            started = time.monotonic()
            batch = demonstration_batch(run, step)
            state, report = programs.supervised_update(state, batch)
            step += 1
            metrics = _supervised_metrics(report, batch, started)
            skipped, stopping = int(report.skipped), run.interrupts.requested()
            if guard.too_many_skipped(run, skipped, step) or (skipped and step == total):
                guard.stop(run, skipped, step, checkpoints, int(state.updates) > saved)
            due = step % save_every == 0 or step == total
            heldout = heldout_loss(run, state.model) if due else {}
            if heldout or step % max(total // 15, 1) == 0 or step in (1, total):
                log.log(step, metrics | heldout | clock.read())
            if not skipped and (stopping or due):
                checkpoints.save(step, state, logged=log.synchronize())
                saved = int(state.updates)
            if stopping:
                raise run.interrupts.error(
                    f"the warm start is saved after update {checkpoints.latest_step()} of {total}"
                )
        return state.model


def _logger(run: Run, checkpoints: Any, step: int) -> MetricLogger:
    """Returns the logger of a warm start that continues after `step` updates."""
    with bad_input():
        logged = checkpoints.logged(step) if step else None
        measured = run.examples is not None and bool(run.examples.heldout)
        return MetricLogger(
            run.workdir / "sft",
            run.programs.supervised_updates,
            first_step=step + 1 if step or not measured else 0,
            config=run.config,
            expected=logged,
        )


def _supervised_metrics(report: Report, batch: Batch, started: float) -> dict[str, float]:
    """Metrics of one supervised update that began at `started` (seconds); waits for the update."""
    tokens, nll = jnp.sum(batch.mask > 0), -jnp.sum(report.trace.logp)
    metrics, tokens, nll = jax.device_get((report.metrics, tokens, nll))
    seconds = time.monotonic() - started
    return metrics | {"loss": nll / tokens, "tokens_per_second": tokens / seconds}


def heldout_loss(run: Run, model: Transformer) -> dict[str, float]:
    """Returns the mean −log p of the held-out examples' tokens as a metric; {} without examples."""
    heldout, size = run.examples.heldout if run.examples else (), run.config.sft.batch
    batches = [example_batch(run, heldout[i : i + size]) for i in range(0, len(heldout), size)]
    if not batches:
        return {}
    sums = jax.device_get([run.programs.likelihood(model, batch) for batch in batches])
    logp, tokens = np.sum(np.array(sums, np.float64), axis=0)
    return {"heldout/loss": -logp / tokens}


def demonstration_batch(run: Run, step: int) -> Batch:
    """Returns the examples, or the demonstrations, of one supervised update."""
    if run.examples:
        return example_batch(run, run.examples.batch(step))
    config, tokenizer, sft = run.config, run.tokenizer, run.config.sft
    demonstrations = data.TASKS[config.data.task].demonstrations
    # config/data_rules.py allows sft.steps only with demonstrations.
    assert demonstrations is not None
    pairs = demonstrations(
        config.data,
        config.seed,
        step,
        sft.batch,
        sft.direct_share,
        sft.direct_error,
        sft.worked_error,
    )
    return example_batch(
        run,
        [
            Example.of(tokenizer.encode(prompt), tokenizer.response(response))
            for prompt, response in pairs
        ],
    )


def example_batch(run: Run, examples: Sequence[Example]) -> Batch:
    """Returns the batch of at most sft.batch examples; rows beyond them carry no loss."""
    programs, size = run.programs, run.config.sft.batch
    tokens = np.zeros((size, programs.supervised_width), np.int32)
    prompt_lengths, response_lengths = np.ones(size, np.int32), np.zeros(size, np.int32)
    for row, (prompt, response, _) in enumerate(examples):
        prompt_lengths[row], response_lengths[row] = start, length = len(prompt), len(response)
        tokens[row, :start], tokens[row, start : start + length] = prompt, response
    learned = None
    if any(example.learned is not None for example in examples):
        learned = np.ones((size, max(response_lengths)), bool)
        for row, example in enumerate(examples):
            if example.learned is not None:
                learned[row, : len(example.learned)] = example.learned
    return programs.supervised_batch(tokens, prompt_lengths, response_lengths, learned)
