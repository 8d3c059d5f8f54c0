"""The calls of a rollout step: which programs run, how often, and with which arguments.

A step of `loop` makes these calls, in this order:

    sync                                   once
    prefill, first_tokens, admit, decode   until every response is sampled
    rescore                                per mini-batch, once for log π_old if the updates need it,
                                           and once for the reference of a KL penalty
    update                                 per mini-batch, in every epoch

Before the first step, `warm start` runs the supervised updates. `preflight` compiles this list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from drpo_jax.config import has_warm_start
from drpo_jax.costs import Program
from drpo_jax.learner import Batch
from drpo_jax.parallel import named_sharding
from drpo_jax.programs import Programs


def needs_old_logp(programs: Programs) -> bool:
    """Whether the updates need log π_old, the learner's own score of the rollout."""
    objective = programs.config.objective
    scored = objective.behavior == "rescored" or objective.baseline == "otb"
    return scored or "old_logp" in programs.objective.arrays


def update_inputs(programs: Programs) -> list[str]:
    """Returns the names of `Batch.inputs` for the policy's updates."""
    needed, names = programs.objective.arrays, ["behavior_logp", "advantage"]
    if "topk_logp" in needed:
        names += ["topk_ids", "behavior_topk_logp"]
    names += [name for name in ("old_logp", "ref_logp") if name in needed]
    names += ["correction"] * (programs.config.objective.correction != "none")
    return names + list(programs.hyper)


def score_inputs(programs: Programs) -> list[str]:
    """Returns the names of `Batch.inputs` for the pass that scores log π_old."""
    return [name for name in update_inputs(programs) if name == "topk_ids"]


def rollout_step(programs: Programs) -> list[Program]:
    """Returns the calls of a rollout step and of the warm start.

    Prompts and responses have their maximum lengths, and rows are not packed. Arguments are
    `jax.ShapeDtypeStruct`s with shardings.
    """
    config, state = programs.config, programs.abstract_state
    train, updates = config.train, programs.updates_per_epoch
    model = {"parameters": state.model}
    optimizer = {"optimizer state": state.opt_state}
    reference = {} if config.objective.kl == "none" else {"reference model": state.model}

    def batch(names):
        return abstract_batch(programs, programs.update_shape, names, train.routing_replay)

    scores = needs_old_logp(programs) + bool(reference)
    learner = [
        Program("sync", programs.sync, model, resident=optimizer | reference, calls=1),
        Program(
            "rescore",
            programs.rescore,
            model | {"batch": batch(score_inputs(programs))},
            resident=optimizer | reference,
            calls=updates * scores,
        ),
        Program(
            "update",
            programs.policy_update,
            {"learner state": state, "batch": batch(update_inputs(programs))},
            resident=reference,
            calls=updates * train.epochs,
        ),
    ]
    return _warm_start(programs) + learner + _sampling(programs, model | optimizer | reference)


def _warm_start(programs: Programs) -> list[Program]:
    if not has_warm_start(programs.config):
        return []
    shape = programs.config.sft.batch, programs.row_width(programs.supervised_width)
    batch = abstract_batch(programs, shape, ())
    arguments = {"learner state": programs.abstract_sft_state, "batch": batch}
    return [Program("warm start", programs.supervised_update, arguments)]


def _sampling(programs: Programs, resident: Mapping[str, Any]) -> list[Program]:
    """Returns the sampler's calls for all responses of a rollout.

    A decode call runs `decode_steps` steps. With train.partial_tokens, prefilled rows are as long as
    those of continued responses; their number is that of a step that continues none.

    Args:
      resident: name → the learner's arrays, which stay in device memory.
    """
    sampler, train = programs.config.sampler, programs.config.train
    prompt, response = sampler.max_prompt_length, sampler.max_response_length
    largest = programs.sampler.largest(
        programs.abstract_weights,
        programs.sampling_params,
        begun=train.partial_tokens > 0,
    )
    prompts_at_once, chunk = largest["prefill"][1]["tokens"].shape
    prefills = -(-train.prompts // prompts_at_once)
    waves = -(-train.prompts * train.samples // sampler.slots)
    calls = {
        "prefill": prefills * -(-prompt // chunk),
        "first_tokens": prefills,
        "admit": prefills,
        "decode": waves * response / sampler.decode_steps,
    }
    # The buffers of each program stay in device memory while the others run.
    buffers = {
        name: array
        for _, arguments, _ in largest.values()
        for name, array in arguments.items()
        if name in ("sampler weights", "caches", "prompts")
    }
    return [
        Program(
            name,
            function,
            arguments,
            keywords,
            resident={**resident, **{k: v for k, v in buffers.items() if k not in arguments}},
            calls=calls[name],
            mesh=programs.sampler_mesh,
        )
        for name, (function, arguments, keywords) in largest.items()
    ]


def abstract_batch(
    programs: Programs, shape: tuple[int, int], names: Sequence[str], replay: bool = False
) -> Batch:
    """Returns a Batch as `jax.ShapeDtypeStruct`s.

    Args:
      shape: (P, T), rows and tokens of a row.
      names: names of the batch's `inputs`.
      replay: whether the batch contains the sampler's routes.
    """
    sampler, model = programs.config.sampler, programs.model_config
    parts = named_sharding(programs.mesh, ("batch", "length"))

    def array(dtype, *more):
        return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=parts)

    def token_input(name):
        top = (sampler.top_logprobs,) if "topk" in name else ()
        return array(jnp.int32 if name == "topk_ids" else jnp.float32, *top)

    return Batch(
        tokens=array(jnp.int32),
        segment_ids=array(jnp.int32),
        positions=array(jnp.int32),
        mask=array(jnp.int32),
        inputs={name: token_input(name) for name in names},
        routes=array(jnp.int16, model.layers, model.experts_per_token) if replay else None,
    )
