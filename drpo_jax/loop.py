"""The RL loop: sample, verify, advantages, update, log, save. And the warm start before it.

All randomness is a function of (config.seed, step, purpose), so a run that was killed and started
again does what it would have done.
"""

import contextlib
import itertools
import logging
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax import data, problems, rewards
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.config import claim_workdir, from_json
from drpo_jax.errors import BadInput, TrainingStopped, bad_input
from drpo_jax.learner.record import save_rollout
from drpo_jax.metrics import CompileClock, MetricLogger, read_metrics, reduce_pairs
from drpo_jax.models import from_pretrained
from drpo_jax.objectives import (
    advantages,
    informative,
    mismatch_weight,
    reward_penalty,
    with_spread,
)
from drpo_jax.parallel import make_mesh, multihost, shardings
from drpo_jax.programs import Programs
from drpo_jax.sampler import Rollouts, SamplingParams
from drpo_jax.storage import path_of

# Streams of randomness: folded into the seed's key after the step.
INIT, SAMPLE, EVALUATE, SHUFFLE, NOISE = range(5)


class Run:
    """What the phases of a run share: data, reward, mesh, programs, checkpoints.

    Args:
      config: a resolved config.
      workdir: of the run; nothing is written there yet.
      train: False for an evaluation, which needs no training problems.

    Raises:
      BadInput: a problem with the data or the mesh, before anything is computed.
    """

    def __init__(self, config, workdir: Path, train: bool = True):
        self.config, self.workdir = config, workdir
        self.reward = rewards.REWARDS[config.reward.name]
        with bad_input():
            self.tokenizer = data.make_tokenizer(config.data, config.model.path)
            if self.tokenizer.vocab_size > config.model.vocab_size:
                raise BadInput(
                    f"model.vocab_size = {config.model.vocab_size}: must be at least the "
                    f"tokenizer's {self.tokenizer.vocab_size}"
                )
            found = problems.load(config, self.tokenizer, train)
            self.train_problems = data.ProblemStream(found.train, config.seed) if train else None
            self.heldout, self.report = found.heldout, found.report
            self._check_init_from()
            self.mesh = make_mesh(**config.mesh)
            self.programs = Programs(config, self.mesh, stop=self.tokenizer.stop_ids)
        self.reference = None  # the model that a KL penalty holds the policy to
        self.parity_checked = not train or config.sampler.parity == "off"  # see `parity`

    def _check_init_from(self):
        source = self.config.data.init_from
        if not source:
            return
        with self.warm_start() as checkpoints:
            step = checkpoints.latest_step()
        if step is None:
            raise BadInput(
                f"data.init_from = {source!r}: no checkpoint of a warm start below it; give the "
                "workdir of a run of drpo_jax.sft or drpo_jax.train"
            )
        total = from_json((path_of(source) / "config.json").read_text()).sft.steps
        if step < total:
            raise BadInput(
                f"data.init_from = {source!r}: its warm start is at step {step} of {total}; let it "
                "finish first"
            )

    def warm_start(self) -> Checkpoints:
        """The checkpoints of the warm start: this run's, or those that data.init_from names."""
        return self._checkpoints(path_of(self.config.data.init_from or self.workdir) / "sft")

    def key(self, step: int, purpose: int):
        """The PRNG key of one purpose at one step."""
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.config.seed), step), purpose
        )

    def checkpoints(self) -> Checkpoints:
        return self._checkpoints(self.workdir)

    def _checkpoints(self, directory: Path) -> Checkpoints:
        options = self.config.checkpoint
        return Checkpoints(directory / "checkpoints", options.keep, options.best_metric)

    def sample(self, sampler, asked, params, key, places=None):
        """Responses to the problems `asked`, each problem's as soon as they are complete; they are
        verified while the others are sampled, each process verifying its share of the problems.

        Args:
          places: of the problems in a longer list, of which `asked` is a part.

        Yields:
          (index into `asked`, Rollouts, texts, rewards as `rewards.Pending`) of params.samples rows;
          without texts and rewards where the problem is another process's.
        """
        prompts = problems.encode(self.config, self.tokenizer, asked)
        own = multihost.share(range(len(asked)))
        for i, group in sampler.stream(prompts, params, key, places):
            if i not in own:
                yield i, group, None, None
                continue
            texts, problem = group.texts(self.tokenizer), asked[i]
            question, answer = [problem.prompt] * len(texts), [problem.answer] * len(texts)
            yield i, group, texts, rewards.submit(self.reward, question, texts, answer)


# ------------------------------------------------------------------------------ the warm start


def supervised(run: Run):
    """Supervised learning on the task's demonstrations; resumes by itself. → the model."""
    config, programs = run.config, run.programs
    total = config.sft.steps
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(run.warm_start())
        step = checkpoints.latest_step() or 0
        state = (
            checkpoints.restore(step, programs.abstract_sft_state)
            if step
            else programs.init(run.key(0, INIT))
        )
        if step == total:
            return state.model
        log = stack.enter_context(MetricLogger(run.workdir / "sft", total, first_step=step + 1))
        clock = CompileClock()
        save_every = max(total // 4, 1)
        print(f"supervised warm start: {total} updates of {config.sft.batch} demonstrations")
        while step < total:
            started = time.monotonic()
            batch = demonstration_batch(run, step)
            state, report = programs.supervised_update(state, batch)
            step += 1
            tokens, nll = jnp.sum(batch.mask > 0), -jnp.sum(report.trace.logp)
            metrics, tokens, nll = jax.device_get((report.metrics, tokens, nll))
            if stuck := stuck_updates(run, report.skipped, step):
                _stop(run, stuck, step, checkpoints)
            seconds = time.monotonic() - started
            metrics |= {"loss": nll / tokens, "tokens_per_second": tokens / seconds}
            if step % max(total // 15, 1) == 0 or step in (1, total):
                log.log(step, metrics | clock.read())
            if step % save_every == 0 or step == total:
                checkpoints.save(step, state)
        return state.model


def demonstration_batch(run: Run, step: int):
    """The demonstrations of one supervised update, as a Batch."""
    config, tokenizer = run.config, run.tokenizer
    sft, prompt_room = config.sft, config.sampler.max_prompt_length
    room = config.sampler.max_response_length
    pairs = data.demonstrations(
        config.data,
        config.seed,
        step,
        sft.batch,
        sft.direct_share,
        sft.direct_error,
        sft.worked_error,
    )
    tokens = np.zeros((sft.batch, prompt_room + room), np.int32)
    prompt_lengths, response_lengths = np.zeros((2, sft.batch), np.int32)
    for row, (prompt, response) in enumerate(pairs):
        prompt, response = tokenizer.encode(prompt), tokenizer.encode(response)
        response = response + [tokenizer.eos_id]
        tokens[row, : len(prompt) + len(response)] = prompt + response
        prompt_lengths[row], response_lengths[row] = len(prompt), len(response)
    return run.programs.batch(tokens, prompt_lengths, response_lengths, {})[0]


# ------------------------------------------------------------------------------------- the loop


def train(config, workdir: Path) -> tuple[dict, dict] | None:
    """Warm start, then RL; resumes a run that `workdir` holds.

    Returns:
      The records of the evaluations before and after; None on all processes but the first.
    """
    run = Run(config, workdir)
    claim(run)
    programs, total = run.programs, config.train.steps
    devices = run.mesh.devices
    print(f"{workdir}: seed {config.seed} on {devices.size} x {devices.flat[0].device_kind}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(run.mesh))
        checkpoints = stack.enter_context(run.checkpoints())
        step = checkpoints.latest_step()
        if step is None:
            state, step = programs.restart(initial_model(run)), 0
        else:
            state = checkpoints.restore(step, programs.abstract_state)
            print(f"resuming {workdir} after step {step}")
        if config.objective.kl != "none":  # its own arrays: the updates donate the state's
            run.reference = initial_model(run)
        log = stack.enter_context(MetricLogger(workdir, total, first_step=step + bool(step)))
        clock = CompileClock()
        if step == 0:
            _announce(config, run)
            metrics = evaluate(run, state.model)
            log.log(0, metrics)
            checkpoints.save(0, state, metrics)
        while step < total:
            state, metrics = rl_step(run, state, step)
            step += 1
            stuck = stuck_updates(run, metrics["updates/skipped_in_a_row"], step)
            last = step == total
            if not stuck and (last or _due(step, config.evaluate.every)):
                metrics |= evaluate(run, state.model)
            evaluated = "eval/avg" in metrics
            if stuck or last or evaluated or _due(step, config.log.every):
                log.log(step, metrics | clock.read())
            if stuck:
                _stop(run, stuck, step, checkpoints)
            if last or evaluated or _due(step, config.checkpoint.every):
                checkpoints.save(step, state, metrics)
    if not multihost.is_main():
        return None
    evaluations = [r for r in read_metrics(workdir) if "eval/avg" in r]
    return evaluations[0], evaluations[-1]


def claim(run: Run):
    """Binds the workdir to the run's config and problems.

    Raises:
      BadInput: it holds another run.
    """

    def write():
        claim_workdir(run.workdir, run.config)
        if run.report:
            keep_report(run.report, run.workdir / "problems.txt")

    with bad_input():
        multihost.on_main("claim the workdir", write)


def keep_report(report: str, path: Path):
    """Writes what `problems.load` reports beside the run, once.

    Raises:
      BadInput: a run that is resumed began with other problems.
    """
    if path.exists() and path.read_text() != report:
        raise BadInput(
            f"the problems are no longer those that the run began with ({path} says which they were): "
            "restore them, or take another --workdir"
        )
    path.write_text(report)
    print(f"{report.strip().splitlines()[-1]} ({path})")


def initial_model(run: Run, supervise: bool = True):
    """The model that RL starts from: a directory's, another run's, the warm start's, or a random one
    (also, without `supervise`, where the warm start has not been made)."""
    config = run.config
    if config.model.path:
        place = partial(shardings, run.mesh)
        with bad_input():
            return from_pretrained(config.model.path, shardings=place)[0]
    if not config.data.init_from and not config.sft.steps:
        return run.programs.init(run.key(0, INIT)).model
    with bad_input(), run.warm_start() as checkpoints:
        step = checkpoints.latest_step()
        if config.data.init_from or step == config.sft.steps:
            like = {"model": run.programs.abstract_sft_state.model}
            return checkpoints.restore(step, like)["model"]
    return supervised(run) if supervise else run.programs.init(run.key(0, INIT)).model


def rl_step(run: Run, state, step: int):
    """One rollout and its updates. → the new state and the metrics (host floats)."""
    config, programs = run.config, run.programs
    started = time.monotonic()
    noise = run.key(step, NOISE)
    weights = jax.block_until_ready(programs.sync(state.model, noise))
    programs.sampler.load(weights, version=step)
    synced = time.monotonic()
    asked = run.train_problems.batch(step, config.train.prompts)
    key = run.key(step, SAMPLE)
    groups = run.sample(programs.sampler, asked, programs.sampling_params, key)
    _, pieces, texts, verdicts = zip(*sorted(groups, key=lambda group: group[0]))
    bytes_moved = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    programs.sampler.load(None)
    del weights  # its memory is the updates' now
    statistics, slots = programs.sampler.read_statistics(), config.sampler.slots
    rollouts = Rollouts.concatenate(pieces)
    sampled = time.monotonic()

    # Of the problems that are this process's, which lie next to each other; then of all.
    reward = [pending.result() for pending in verdicts if pending is not None]
    texts = list(itertools.chain.from_iterable(filter(None, texts)))
    lengths = multihost.share(rollouts.response_lengths.reshape(-1, config.train.samples))
    parts = multihost.gather(
        "rewards",
        reward=np.concatenate([np.zeros(0, np.float32), *reward]),
        added=shaping(config, texts, lengths.reshape(-1)),
    )
    reward, added = (np.concatenate([part[name] for part in parts]) for name in ("reward", "added"))
    used = reward + added
    if config.train.shuffle_rewards:
        used = np.random.default_rng([config.seed, step, SHUFFLE, 1]).permutation(used)
    rewarded = time.monotonic()

    saved = _due(step, config.train.save_rollout_every)
    compared = saved or _due(step, config.log.mismatch_every)
    inputs, old_logp, penalties = objective_inputs(
        run, state.model, rollouts, used, step, rescore=compared or not run.parity_checked
    )
    synced_logp = old_logp  # what the learner gives for the weights that the sampler had
    if config.precision.noise and old_logp is not None:
        noisy = programs.perturbed(state.model, noise)
        synced_logp = score(run, noisy, rollouts, step, {}).logp
        del noisy
    if not run.parity_checked:
        parity(run, rollouts, synced_logp)
    state, learned, metrics = learn(run, state, rollouts, inputs, step, keep=compared)
    metrics |= penalties
    if compared:
        metrics |= mismatch(run, rollouts, old_logp, synced_logp, learned["logp"], inputs)
    learned_at = time.monotonic()
    if saved and multihost.is_main():
        rows = [problem for problem in asked for _ in range(config.train.samples)]
        piece_ids, piece_texts = rollouts.pieces(run.tokenizer)
        save_rollout(
            run.workdir,
            step,
            **learned,
            tokens=rollouts.tokens,
            prompt_lengths=rollouts.prompt_lengths,
            response_lengths=rollouts.response_lengths,
            response_mask=rollouts.mask(),
            behavior_logp=inputs["behavior_logp"],
            sampled_logp=rollouts.sampled_logp,
            old_logp=old_logp,
            advantage=inputs["advantage"],
            reward=reward,
            finished=rollouts.finished,
            version=rollouts.version,
            piece_ids=piece_ids,
            piece_texts=piece_texts,
            id=np.array([p.id for p in rows]),
            prompt=np.array([p.prompt for p in rows]),
            response=rollouts.texts(run.tokenizer),
            answer=np.array([p.answer for p in rows]),
            kind=np.array([p.kind for p in rows]),
        )
    finished = time.monotonic()

    metrics |= {
        "reward/mean": reward.mean(),
        "reward/added": added.mean(),
        "reward/informative_groups": np.mean(
            informative(inputs["advantage"], config.train.samples)
        ),
        "response/length": rollouts.response_lengths.mean(),
        "response/length_max": rollouts.response_lengths.max(),
        "response/truncated": 1 - rollouts.finished.mean(),
        "tokens_per_second": rollouts.response_lengths.sum() / (finished - started),
        "sampler/live_rows": statistics["live_rows"] / max(statistics["steps"], 1) / slots,
        "sampler/decode_steps": statistics["steps"],
        "sync/gigabytes": bytes_moved / 1e9,
        "time/step": finished - started,
        "time/sync": synced - started,
        "time/sample": sampled - synced,
        "time/reward": rewarded - sampled,
        "time/update": learned_at - rewarded,
    }
    return state, metrics


def mismatch(run: Run, rollouts, old_logp, synced_logp, logp, inputs):
    """Metrics of how far µ is from the learner's own logprobs. With precision.noise, which part of it
    is real (between sampler and learner with the same weights) and which is the noise's."""
    advantage, mask = inputs["advantage"][:, None], rollouts.mask()
    compare = run.programs.mismatch
    pairs, extremes = compare(rollouts.full_logp, old_logp, logp, advantage, mask)
    metrics = reduce_pairs(pairs) | jax.device_get(extremes)
    if synced_logp is not old_logp:
        for part, gap in (
            ("real", (rollouts.full_logp, synced_logp)),
            ("injected", (synced_logp, old_logp)),
        ):
            found = reduce_pairs(compare(*gap, logp, advantage, mask)[0])
            for name in ("shift", "kl", "logp"):
                metrics[f"mismatch/{name}_{part}"] = found[f"mismatch/{name}"]
    return metrics


# Mean |Δ log p| up to which sampler and learner count as one model, nat: those that
# `python -m benchmarks.mismatch` measures, with room for larger models. FP8 on both sides is no
# exception: operands that differ in the last bit of bfloat16 may get different codes.
PARITY_BOUND = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.3}


def parity(run: Run, rollouts, old_logp):
    """Compares the sampler's logprobs of the first rollout with those that the learner gives it.

    Raises:
      TrainingStopped: they differ by more than the bound, and sampler.parity is "stop".
    """
    run.parity_checked, config = True, run.config
    rounded = config.precision.recipe != "none" or config.precision.kv_cache != "none"
    kind = "fp8" if rounded else config.compute.dtype
    bound = config.sampler.parity_bound or PARITY_BOUND[kind]
    gap = np.abs(rollouts.full_logp - old_logp)[rollouts.mask()]
    told = (
        f"sampler and learner on the first rollout: mean |difference of log p| {gap.mean():.2g}, "
        f"largest {gap.max():.2g}, over {len(gap)} tokens (bound of the mean: {bound:.2g})"
    )
    if gap.mean() <= bound:
        print(told)
        return
    told += (
        ". The ratio of the objective then measures this difference instead of the policy's change. "
        "Look at compute.dtype, precision.recipe and, for mixtures of experts, train.routing_replay; "
        "objective.behavior=rescored takes the learner's own logprobs for mu"
    )
    if config.sampler.parity == "stop":
        raise TrainingStopped(told + " (sampler.parity = 'stop')")
    logging.warning(told)


def shaping(config, texts, lengths):
    """What `config.reward` adds to the verdicts, float32 [N]."""
    added = np.zeros(len(texts), np.float32)
    if config.reward.format:
        added += config.reward.format * rewards.format_reward(texts)
    if buffer := config.reward.overlong_buffer:
        added += rewards.overlong_penalty(lengths, config.sampler.max_response_length, buffer)
    return added


def objective_inputs(run: Run, model, rollouts, reward, step: int, rescore: bool):
    """What the updates need of a rollout besides its tokens.

    Args:
      reward: float32 [N], as it is learned from.
      rescore: also score the rollout with `model` where the objective does not need it.

    Returns:
      The arrays of `learner.Batch.inputs`, [N] or [N, R, …] by name; log π_old [N, R], the rollout as
      `model` itself scores it, or None; metrics of what was taken from the reward.
    """
    config, programs = run.config.objective, run.programs
    rescored = config.behavior == "rescored"
    topk = {"topk_ids": rollouts.top_ids} if "topk_logp" in programs.objective.arrays else {}
    old = reference = None
    if rescore or rescored or "old_logp" in programs.objective.arrays:
        old = score(run, model, rollouts, step, topk)
    # π is the full softmax at the sampling temperature; so should the µ be that it is compared with.
    mu = {"sampler": rollouts.full_logp, "sampler_filtered": rollouts.sampled_logp}.get(
        config.behavior
    )
    inputs = {"behavior_logp": old.logp if rescored else mu}
    if topk:
        topk_mu = old.topk_logp if rescored else rollouts.top_logp
        inputs |= topk | {"behavior_topk_logp": topk_mu}
    if "old_logp" in programs.objective.arrays:
        inputs["old_logp"] = old.logp
    if config.kl != "none":
        reference = score(run, run.reference, rollouts, step, {}, replay=False).logp
    penalties = {}
    if config.kl == "k1":
        start = old.logp if rescored else rollouts.full_logp  # never filtered: π_ref is not
        penalty = reward_penalty(start, reference, rollouts.mask())
        penalty = config.kl_coefficient * np.asarray(penalty)
        reward, penalties = reward - penalty, {"reward/kl_penalty": penalty.mean()}
    elif config.kl != "none":
        inputs["ref_logp"] = reference
    if config.correction != "none":
        inputs["correction"] = np.asarray(
            mismatch_weight(
                config.correction,
                old.logp,
                rollouts.full_logp,
                rollouts.mask(),
                level=config.correction_level,
                cap=config.correction_cap,
                floor=config.correction_floor,
            )
        )
    inputs["advantage"] = np.asarray(advantages(config.advantage, reward, run.config.train.samples))
    return inputs, old.logp if old else None, penalties


def score(run: Run, model, rollouts, step: int, inputs, replay=True):
    """TokenTrace of [N, R] host arrays: the rollout's tokens as `model` scores them."""
    pieces, order = [], mini_batches(run.config, step, 0)
    for rows in order:
        batch, layout = run.programs.rollout_batch(rollouts, rows, inputs, replay)
        pieces.append((run.programs.rescore(model, batch), layout))
    return _by_response(pieces, order, rollouts)


def _by_response(pieces, order, rollouts):
    """Pytrees of [P, T, …] with their layouts, of the rows in `order` → one of [N, R, …] on the host."""
    length = rollouts.sampled_logp.shape[1]
    taken = [
        jax.tree.map(lambda a: layout.take(a, length), multihost.fetch(tree))  # noqa: B023
        for tree, layout in pieces
    ]
    back = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *a: np.concatenate(a)[back], *taken)


def learn(run: Run, state, rollouts, inputs, step: int, keep: bool):
    """The updates on one rollout, all anchored on the same µ: the later ones are off-policy.

    Args:
      keep: fetch the learner's view of the rollout.

    Returns:
      The new state; if it is kept, the learner's view of the rollout's tokens (logp, coefficient,
      entropy, weight by name: [N, R], of the first epoch), else {}; the metrics over all updates.
    """
    config, programs = run.config.train, run.programs
    reports, kept, order = [], [], []
    for epoch in range(config.epochs):
        for rows in mini_batches(run.config, step, epoch):
            batch, layout = programs.rollout_batch(rollouts, rows, inputs)
            state, report = programs.policy_update(state, batch)
            pairs, extremes = programs.summarize(report.trace, batch)
            reports.append((pairs, extremes, report.metrics, report.skipped))
            if keep and epoch == 0:
                seen = report.trace._asdict()
                seen.pop("topk_logp")
                kept.append((seen, layout))
                order.append(rows)
    pairs, extremes, updates, skipped = zip(*jax.device_get(reports))
    sums = jax.tree.map(lambda *a: np.sum(a, dtype=np.float64), *pairs)
    metrics = with_spread(reduce_pairs(sums))
    for name in extremes[0]:
        combine = min if name.endswith("_min") else max
        metrics[name] = combine(e[name] for e in extremes)
    metrics |= {name: np.mean([u[name] for u in updates]) for name in updates[0]}
    metrics["grad_norm_max"] = max(u["grad_norm"] for u in updates)
    metrics["updates/skipped"] = sum(count > 0 for count in skipped)
    metrics["updates/skipped_in_a_row"] = max(skipped)
    return state, _by_response(kept, order, rollouts) if keep else {}, metrics


def mini_batches(config, step: int, epoch: int):
    """Row indices of each mini-batch: whole groups, in an order drawn from (seed, step, epoch)."""
    prompts, samples = config.train.prompts, config.train.samples
    order = np.random.default_rng([config.seed, step, SHUFFLE, 2 + epoch]).permutation(prompts)
    rows = (order[:, None] * samples + np.arange(samples)).reshape(-1)
    return np.split(rows, prompts // config.train.mini_batch_prompts)


def evaluate(
    run: Run, model, generations: list | None = None, keep=lambda new: None, places=None
) -> dict:
    """Held-out accuracy of the unquantized model, on a random stream of its own.

    Args:
      generations: dicts of an evaluation that was interrupted, which is gone on with (all responses to
        a problem or none): a list, to which one dict per response is added (id, kind, mode, prompt,
        response, answer, reward, tokens, finished), and which is put in order.
      keep: called with the new ones of every problem.
      places: of the problems to evaluate among the held-out ones; None: all.

    Returns:
      eval/avg, the mean over problems of the share of right answers among `evaluate.samples`
      sampled at `evaluate.temperature`, eval/greedy, and both per kind of problem.
    """
    config, sampler = run.config.evaluate, run.programs.exact_sampler
    sampler.load(run.programs.sync_exact(model))
    base = dict(max_tokens=run.config.sampler.max_response_length, stop=run.tokenizer.stop_ids)
    modes = {"avg": SamplingParams(samples=config.samples, temperature=config.temperature, **base)}
    if config.greedy:
        modes["greedy"] = SamplingParams(temperature=0.0, **base)
    generations = [] if generations is None else generations
    for mode, params in modes.items():
        done = {g["id"] for g in generations if g["mode"] == mode}
        places = range(len(run.heldout)) if places is None else places
        missing = [i for i in places if run.heldout[i].id not in done]
        asked = [run.heldout[i] for i in missing]
        groups = run.sample(sampler, asked, params, run.key(0, EVALUATE), missing)
        for i, rollouts, texts, rewarded in _verified(groups):
            p, texts = asked[i], texts or rollouts.texts(run.tokenizer)
            new = [
                {"id": p.id, "kind": p.kind, "mode": mode, "prompt": p.prompt, "response": text,
                 "answer": p.answer, "reward": float(reward), "tokens": int(tokens),
                 "finished": bool(finished)}
                for text, reward, tokens, finished in zip(
                    texts, rewarded, rollouts.response_lengths, rollouts.finished
                )
            ]  # fmt: skip
            keep(new)
            generations += new
    order = {problem.id: i for i, problem in enumerate(run.heldout)}
    generations.sort(key=lambda g: (g["mode"], order[g["id"]]))
    sampler.load(None)
    metrics = {}
    for mode in modes:
        mine = [g for g in generations if g["mode"] == mode]
        metrics[f"eval/{mode}"] = np.mean([g["reward"] for g in mine])
        kinds = sorted({g["kind"] for g in mine})
        for kind in kinds if len(kinds) > 1 else ():
            rewards_of = [g["reward"] for g in mine if g["kind"] == kind]
            metrics[f"eval/{mode}/{kind}"] = np.mean(rewards_of)
        if mode == "avg":
            metrics["eval/length"] = np.mean([g["tokens"] for g in mine])
            metrics["eval/truncated"] = np.mean([not g["finished"] for g in mine])
    return {name: float(value) for name, value in metrics.items()}


def _verified(groups, together=32):
    """The groups of `Run.sample` with their rewards, which are waited for, and told to all processes,
    when as many again have been sampled."""
    parts = iter(lambda: list(itertools.islice(groups, together)), [])
    for part, _ in itertools.pairwise(itertools.chain(parts, [None])):
        own = [(i, verdicts.result()) for i, _, _, verdicts in part if verdicts is not None]
        told = multihost.gather("verdicts", of=[i for i, _ in own], reward=[r for _, r in own])
        found = {i: reward for one in told for i, reward in zip(one["of"].tolist(), one["reward"])}
        for i, rollouts, texts, _ in part:
            yield i, rollouts, texts, found[i]


def _announce(config, run):
    size = sum(leaf.size for leaf in jax.tree.leaves(run.programs.abstract_state.model))
    updates = config.train.prompts // config.train.mini_batch_prompts * config.train.epochs
    print(
        f"{config.objective.name} on {size / 1e6:.1f}M parameters, precision recipe "
        f"{config.precision.recipe!r}: {config.train.steps} rollouts of {config.train.prompts} "
        f"prompts x {config.train.samples} samples, {updates} updates each"
    )


def _due(step, every):
    return every and step % every == 0


def stuck_updates(run, skipped, step):
    """Non-finite updates in a row, where they are as many as `train.max_skipped`; else 0."""
    skipped = int(skipped)
    if skipped:
        logging.warning(
            "step %d: a loss or gradient was not finite; %d update(s) in a row skipped",
            step,
            skipped,
        )
    return skipped if skipped >= run.config.train.max_skipped else 0


def _stop(run, skipped, step, checkpoints):
    raise TrainingStopped(
        f"step {step}: the last {skipped} updates had a non-finite loss or gradient and were skipped "
        f"(train.max_skipped = {run.config.train.max_skipped}). The last good checkpoint is that of "
        f"step {checkpoints.latest_step()} in {checkpoints.directory}; lower "
        "optimizer.learning_rate, or look at the saved rollouts, before resuming."
    )
