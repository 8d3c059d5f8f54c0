"""The model that RL starts from, and the supervised warm start that may produce it."""

import contextlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax import data
from drpo_jax.errors import DamagedCheckpoint, bad_input
from drpo_jax.learner import Batch
from drpo_jax.loop import guard
from drpo_jax.metrics import CompileClock, MetricLogger
from drpo_jax.models import Transformer, from_pretrained
from drpo_jax.parallel import shardings
from drpo_jax.run import INIT, Run


def initial_model(run: Run) -> Transformer:
    """Returns the model that RL starts from.

    The first of these applies: the weights in model.path; those of the warm start in data.init_from;
    those of the run's own warm start, which is made now if it does not exist; random weights
    (sft.steps = 0).
    """
    model = existing_model(run)
    if model is not None:
        return model
    if run.config.sft.steps:
        return make_warm_start(run)
    return random_model(run)


def existing_model(run: Run) -> Transformer | None:
    """Returns `initial_model` if its weights exist, in model.path or a finished warm start."""
    config = run.config
    if config.model.path:
        place = partial(shardings, run.mesh)
        with bad_input():
            return from_pretrained(config.model.path, shardings=place)[0]
    if not config.data.init_from and not config.sft.steps:
        return None
    with bad_input(), run.warm_start_checkpoints() as checkpoints:
        step = checkpoints.latest_step()
        if step is None or not (config.data.init_from or step == config.sft.steps):
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


def make_warm_start(run: Run) -> Transformer:
    """Trains on the task's demonstrations; resumes from the last checkpoint.

    Returns:
      The model after sft.steps updates.

    Raises:
      TrainingStopped: too many updates in a row were not finite.
    """
    config, programs = run.config, run.programs
    total = config.sft.steps
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(run.warm_start_checkpoints())
        latest = checkpoints.restore_latest(programs.abstract_sft_state)
        step, state = latest or (0, programs.init(run.key(0, INIT)))
        if step == total:
            return state.model
        with bad_input():
            logged = checkpoints.logged(step) if step else None
            log = MetricLogger(
                run.workdir / "sft", total, first_step=step + 1, config=config, expected=logged
            )
        stack.enter_context(log)
        clock, saved = CompileClock(), int(state.updates)
        save_every = max(total // 4, 1)
        print(f"supervised warm start: {total} updates of {config.sft.batch} demonstrations")
        print("compiling the supervised update …", flush=True)
        while step < total:
            started = time.monotonic()
            batch = demonstration_batch(run, step)
            state, report = programs.supervised_update(state, batch)
            step += 1
            metrics = _supervised_metrics(report, batch, started)
            skipped, stopping = int(report.skipped), run.interrupts.requested()
            if guard.too_many_skipped(run, skipped, step) or (skipped and step == total):
                guard.stop(run, skipped, step, checkpoints, int(state.updates) > saved)
            if step % max(total // 15, 1) == 0 or step in (1, total):
                log.log(step, metrics | clock.read())
            if not skipped and (stopping or step % save_every == 0 or step == total):
                checkpoints.save(step, state, logged=log.synchronize())
                saved = int(state.updates)
            if stopping:
                raise run.interrupts.error(
                    f"the warm start is saved after update {checkpoints.latest_step()} of {total}"
                )
        return state.model


def _supervised_metrics(report, batch, started):
    """Metrics of one supervised update that began at `started` (seconds); waits for the update."""
    tokens, nll = jnp.sum(batch.mask > 0), -jnp.sum(report.trace.logp)
    metrics, tokens, nll = jax.device_get((report.metrics, tokens, nll))
    seconds = time.monotonic() - started
    return metrics | {"loss": nll / tokens, "tokens_per_second": tokens / seconds}


def demonstration_batch(run: Run, step: int) -> Batch:
    """Returns the demonstrations of one supervised update."""
    config, tokenizer = run.config, run.tokenizer
    sft, sampler = config.sft, config.sampler
    demonstrations = data.TASKS[config.data.task].demonstrations
    assert demonstrations is not None  # config/checks.py allows sft.steps only with demonstrations
    pairs = demonstrations(
        config.data,
        config.seed,
        step,
        sft.batch,
        sft.direct_share,
        sft.direct_error,
        sft.worked_error,
    )
    tokens = np.zeros(
        (sft.batch, sampler.max_prompt_length + sampler.max_response_length), np.int32
    )
    prompt_lengths, response_lengths = np.zeros((2, sft.batch), np.int32)
    for row, (prompt, response) in enumerate(pairs):
        prompt, response = tokenizer.encode(prompt), tokenizer.encode(response)
        response = response + [tokenizer.eos_id]
        tokens[row, : len(prompt) + len(response)] = prompt + response
        prompt_lengths[row], response_lengths[row] = len(prompt), len(response)
    return run.programs.batch(tokens, prompt_lengths, response_lengths, {})[0]
