"""Workers: sampling and updates with the programs of a run, or whole steps of the loop of `train`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks.peers import protocol, work
from drpo_jax import loop
from drpo_jax.cli import use_compilation_cache
from drpo_jax.config import default_config, resolve
from drpo_jax.host_memory import return_compilation_memory
from drpo_jax.models import from_pretrained
from drpo_jax.parallel import make_mesh, shardings
from drpo_jax.programs import Programs

PACKAGES = "jax", "jaxlib", "flax"


def new_config(task: dict[str, Any]) -> FrozenConfigDict:
    """Returns the config of a task: GRPO without a KL penalty on problems of equal length."""
    shape, directory = work.Shape(**task["shape"]), Path(task["directory"])
    config = default_config()
    config.model.update(shape.model, path=str(directory / "model"))
    config.sampler.update(
        max_prompt_length=shape.prompt,
        max_response_length=shape.response,
        slots=shape.sequences,
    )
    config.train.update(
        steps=1_000_000,
        prompts=shape.prompts,
        samples=shape.samples,
        mini_batch_prompts=shape.prompts,
        micro_batch=task["settings"]["micro_batch"],
        save_rollout_every=0,
    )
    config.objective.update(name="grpo", advantage="grpo", aggregation="token-mean")
    config.objective.update(epsilon_low=work.EPSILON, epsilon_high=work.EPSILON)
    config.optimizer.update(
        learning_rate=work.LEARNING_RATE,
        b1=work.B1,
        b2=work.B2,
        eps=work.EPS,
        weight_decay=work.WEIGHT_DECAY,
        clip_norm=work.CLIP_NORM,
    )
    config.data.update(task="math", problems=str(directory / "problems.jsonl"))
    config.evaluate.problems = 8
    config.log.mismatch_every = 0
    config.reward.path = "benchmarks.peers.work:judge"
    config.compute.unroll = shape.layers  # The fastest on CPU, see `Compute.unroll`.
    return resolve(config)


class Work:
    """Sampling and updates on one model; call it inside `jax.set_mesh(mesh)`.

    Args:
      task: shape, directory and settings, see `contenders.Contender`. Settings: micro_batch.
      mesh: a mesh of one device.
    """

    def __init__(self, task: dict[str, Any], mesh: jax.sharding.Mesh):
        config, directory = new_config(task), Path(task["directory"])
        self._shape = work.Shape(**task["shape"])
        self._programs = Programs(config, mesh, stop=())
        path = directory / "model"
        model = from_pretrained(path, shardings=lambda tree: shardings(mesh, tree))[0]
        self._programs.sampler.load(self._programs.sync(model))
        self._state = self._programs.restart(model)
        prompts = work.read_prompts(directory)[: self._shape.prompts]
        self._prompts = list(map(work.token_ids, prompts))
        self._given, self._calls = work.Batch.load(directory), 0

    def score(self) -> dict[str, Any]:
        """Returns the logprobs of the given tokens before any update."""
        batch, layout = self._batch()
        trace = self._programs.rescore(self._state.model, batch)
        logp = layout.take(np.asarray(trace.logp), self._shape.response)
        return {"logp": logp.tolist()}

    def sample(self) -> dict[str, Any]:
        """Samples with logprobs, which every call records."""
        self._calls += 1
        rollouts = self._programs.sampler.generate(
            self._prompts, self._programs.sampling_params, jax.random.key(self._calls)
        )
        return {
            "tokens": int(rollouts.response_lengths.sum()),
            "mean_logp": float(rollouts.full_logp.mean()),
        }

    def update(self) -> dict[str, Any]:
        """Makes one optimizer update on the given tokens."""
        batch, _ = self._batch()
        self._state, report = self._programs.policy_update(self._state, batch)
        metrics = jax.device_get(report.metrics)
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def _batch(self):
        count = self._shape.sequences
        lengths = [np.full(count, n, np.int32) for n in (self._shape.prompt, self._shape.response)]
        inputs = {"behavior_logp": self._given.old_logp, "advantage": self._given.advantage}
        tokens = self._given.tokens.astype(np.int32)
        return self._programs.batch(tokens, *lengths, inputs, pack=True)


def serve_steps(server: protocol.Server, task: dict[str, Any]) -> None:
    """Serves steps of `loop.rl_step`, which `train` calls."""
    config = new_config(task)
    run = loop.Run.create(config, Path(task["directory"]) / "ours")
    # No token ends a response early.
    run = dataclasses.replace(run, programs=Programs(config, run.mesh, stop=()))
    collector, step = loop.Collector(), 0
    with jax.set_mesh(run.mesh):
        state = run.programs.restart(loop.warm_start.initial_model(run))

        def next_step():
            nonlocal state, step
            state, metrics, _ = loop.rl_step(run, collector, state, step, first=step == 0)
            step += 1
            tokens = metrics["response/length"] * work.Shape(**task["shape"]).sequences
            return {"tokens": round(tokens), "reward": float(metrics["reward/mean"])}

        server.serve({"step": next_step})


def main(task: dict[str, Any]) -> None:
    """Serves the work of a task."""
    server = protocol.Server(PACKAGES)
    use_compilation_cache("auto")
    return_compilation_memory()
    if task["works"] == ["step"]:
        serve_steps(server, task)
        return
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        one = Work(task, mesh)
        works = {name: getattr(one, name) for name in ("score", "sample", "update")}
        server.serve(works | {"sample_tokens": one.sample})


if __name__ == "__main__":
    protocol.run(main)
