"""What `train` prints besides the metrics: an introduction, notices, and sampled responses."""

from collections.abc import Iterable, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drpo_jax.config import has_warm_start, objective_summary
from drpo_jax.loop.rollout import Example
from drpo_jax.models.huggingface import write_config
from drpo_jax.rewards import reward_summary
from drpo_jax.run import Run

LONGEST = 400  # Longer texts lose their middle; characters.

# Printed when the phase begins for the first time, because compilation is silent and may take minutes.
FIRST_STEP = {
    "sync": "compiling the weight sync …",
    "sample": "compiling prefill and decode, sampling the first rollout …",
    "update": "compiling the update, running the first updates …",
}


def notices(run: Run) -> dict[str, str]:
    """Returns what is printed as the phases of the first step begin; a replay samples nothing."""
    return {k: text for k, text in FIRST_STEP.items() if run.replay is None or k == "update"}


def introduction(run: Run) -> str:
    """Describes the run: model, objective, precision, batches, devices, files."""
    config, devices = run.config, run.mesh.devices
    train, sampler, evaluate = config.train, config.sampler, config.evaluate
    updates = run.programs.updates_per_epoch * train.epochs
    files = {
        "metrics.jsonl, tensorboard/": 1,
        f"checkpoints/ {_every(config.checkpoint.every)}": config.checkpoint.every,
        f"rollouts/ {_every(train.save_rollout_every)}": train.save_rollout_every,
    }
    noun = "problem" if len(run.heldout) == 1 else "problems"
    included = run.replay is not None and run.replay.advantages
    advantage = "from the files" if included else config.objective.advantage
    lines = {
        "model": f"{_model(run)}, {_start(config)}",
        "objective": f"{objective_summary(config)}; advantage {advantage}"
        + (", baseline otb" if config.objective.baseline == "otb" else "")
        + ("; truncated responses carry no loss" if train.overlong_filtering else "")
        + _penalties(config),
        "precision": f"{config.compute.dtype} compute, precision recipe {config.precision.recipe!r}",
        "rollouts": f"{train.steps} of {train.prompts} prompts × {train.samples} responses "
        + _source(run),
        **({} if run.replay is not None else _groups(train)),
        "lengths": f"prompts up to {sampler.max_prompt_length:,} tokens, responses up to "
        f"{sampler.max_response_length:,}",
        "updates": f"{updates} per rollout, on {train.mini_batch_prompts * train.samples} responses "
        f"each, learning rate {config.optimizer.learning_rate:g}",
        "evaluation": f"{len(run.heldout)} held-out {noun}, {evaluate.samples} sampled"
        + " and 1 greedy" * evaluate.greedy
        + f" response{'s' * (evaluate.samples > 1 and not evaluate.greedy)} to each, "
        + "by the rollout sampler, " * (evaluate.precision == "sampler")
        + "before and after training"
        + f" and {_every(evaluate.every)}" * bool(evaluate.every),
        "devices": f"{devices.size} × {devices.flat[0].device_kind}"
        + _axes("", run.mesh)
        + _axes("sampler ", run.programs.sampler_mesh) * any(config.sampler_mesh.values()),
        "seed": f"{config.seed}",
        "files": f"{run.workdir}: " + ", ".join(text for text, every in files.items() if every),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _axes(whose: str, mesh: Mesh) -> str:
    """Returns the axes of a mesh that have several devices."""
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f", {whose}{axes}" if axes else ""


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


def _groups(train: ConfigDict) -> dict[str, str]:
    """Returns the line about dynamic sampling and partial rollouts; {} without them."""
    parts = []
    if train.dynamic_sampling:
        parts.append("groups with equal rewards are replaced")
    if train.partial_tokens:
        parts.append(f"responses get up to {train.partial_tokens:,} tokens per step")
    if not parts:
        return {}
    most = train.max_draws * train.prompts
    return {"groups": "; ".join([*parts, f"at most {most:,} problems per step"])}


def _source(run: Run) -> str:
    """Describes the source of the rollouts."""
    if run.replay is not None:
        return f"(not sampled, but read: {run.replay})"
    data, age = run.config.data, run.config.train.staleness
    return (
        f"({data.problems or data.task}), reward {reward_summary(run.config.reward)}"
        + f", sampled {age} step{'s' * (age != 1)} ahead" * bool(age)
    )


def _penalties(config: ConfigDict) -> str:
    """Returns the terms that are added to the objective, each with its coefficient."""
    objective = config.objective
    terms = {
        f"kl {objective.kl}": objective.kl_coefficient,
        "kl_behavior": objective.kl_behavior,
        "entropy_bonus": objective.entropy_bonus,
    }
    return "".join(f"; {name} {value:g}" for name, value in terms.items() if value)


def _model(run: Run) -> str:
    model = run.programs.model_config
    size = sum(leaf.size for leaf in jax.tree.leaves(run.programs.abstract_state.model))
    unit, scale = next(u for u in (("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1)) if size >= u[1])
    text = f"{write_config(model)['model_type']}, {size / scale:.3g}{unit} parameters, "
    text += f"{model.layers} layers"
    if model.experts:
        text += f" of {model.experts} experts ({model.experts_per_token} per token)"
    return text


def _start(config) -> str:
    """Describes where the initial weights of RL come from."""
    if config.data.init_from:
        return f"from {config.data.init_from}"
    start = f"from {config.model.path}" if config.model.path else "from random weights"
    if not has_warm_start(config):
        return start
    sft = config.sft
    source = sft.files or sft.rollouts or "demonstrations"
    count, noun = (sft.steps, "update") if sft.steps else (sft.epochs, "epoch")
    text = f"a warm start of {count} supervised {noun}{'s' * (count != 1)} on {source}"
    return f"{start} after {text}" if config.model.path else f"from {text}"


def show_example(step: int, example: Example) -> str:
    """Formats a sampled response with its reward, for the console and TensorBoard."""
    lines = [f"step {step}, a sampled response with reward {example.reward:g}:"]
    for name in ("prompt", "response", "answer"):
        text = _shortened(getattr(example, name)).replace("\n", "\n" + " " * 14)
        lines.append(f"    {name:<10}{text}")
    return "\n".join(lines)


def no_gradient(step: int, example: Example) -> str:
    """Returns the notice for a rollout in which every group has equal rewards."""
    return (
        f"step {step}: no group has mixed rewards, so there is no gradient; first response "
        f"(reward {example.reward:g}): {_shortened(example.response)!r}"
    )


def _shortened(text: str) -> str:
    """The text without its middle, if it is longer than LONGEST."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def compilations(records: Iterable[Mapping[str, float]]) -> str:
    """Describes how many programs a run compiled in all its starts, from its records; "" if none."""
    compiled = [r for r in records if r.get("compile/count")]
    if not compiled:
        return ""
    count, seconds = (sum(r[f"compile/{k}"] for r in compiled) for k in ("count", "seconds"))
    last = compiled[-1]["step"]
    return (
        f"{count:.0f} programs compiled in {seconds:.0f} s since the run began, the last one in step "
        f"{last}"
    )
