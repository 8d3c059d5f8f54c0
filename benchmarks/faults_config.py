"""The run of `benchmarks.faults`: a very small model, and a reward that an untrained model receives too.

The environment variable FAULT=MODULE:NAME:CALL[:SIGNAL] makes the process signal itself when
`MODULE.NAME` is called for the CALL-th time; SIGKILL by default. MODULE may end in the name of a class.
"""

import importlib
import os
import signal
from functools import wraps

from benchmarks.faults_reward import reward
from drpo_jax.config import default_config
from drpo_jax.data import CharTokenizer, max_prompt_length, max_response_length
from drpo_jax.rewards import REWARDS, Isolated, Reward

REWARDS["odd"] = Reward(Isolated(reward, workers=1))


def get_config():
    config = default_config()
    config.model.update(
        vocab_size=CharTokenizer.vocab_size, hidden_size=32, layers=2, heads=2, kv_heads=2,
        head_dim=16, mlp_size=0, experts=4, experts_per_token=2, expert_size=32, rope_theta=1e4,
    )  # fmt: skip
    config.data.digits, config.data.operations = 2, "+-"
    config.sampler.max_prompt_length = max_prompt_length(config.data)
    config.sampler.max_response_length = max_response_length(config.data)
    config.sampler.update(slots=16, decode_steps=32)
    config.precision.recipe = "rollout"
    config.reward.name = "odd"
    config.objective.delta = 0.01
    config.optimizer.learning_rate = 3e-3
    config.sft.update(steps=4, batch=16, micro_batch=16, learning_rate=1e-2, warmup_steps=1)
    config.train.update(steps=8, prompts=4, samples=4, mini_batch_prompts=2, micro_batch=8)
    config.evaluate.update(every=3, problems=6, samples=2)
    config.checkpoint.update(every=2, keep=2)
    return config


def _signal_at(place, name, call, number="SIGKILL"):
    try:
        owner = importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, holder = place.rpartition(".")
        owner = getattr(importlib.import_module(module), holder)
    function, calls = getattr(owner, name), []
    if hasattr(function, "__wrapped__"):
        return  # The command line loads the config twice.

    @wraps(function)
    def signalled(*arguments, **keywords):
        calls.append(name)
        if len(calls) == int(call):
            os.kill(os.getpid(), getattr(signal, number))
        return function(*arguments, **keywords)

    setattr(owner, name, signalled)


if fault := os.environ.get("FAULT"):
    _signal_at(*fault.split(":"))
