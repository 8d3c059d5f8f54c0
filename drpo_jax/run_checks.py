"""Checks of a run before it starts: its processes, plug-ins and vocabulary."""

import json
import socket
from collections.abc import Sequence

from ml_collections import FrozenConfigDict

from drpo_jax import data, rewards
from drpo_jax.config import flatten, to_json
from drpo_jax.errors import BadInput
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.parallel import multihost


def check_config(config: FrozenConfigDict) -> None:
    """Raises ValueError unless all processes of the run have the same config.

    `check_plugins` compares the sources of plug-ins.
    """
    texts = [part["text"].item() for part in multihost.gather("config", text=to_json(config))]
    main, *others = [flatten(json.loads(text)) for text in texts]
    for number, other in enumerate(others, 1):
        for field in sorted((main.keys() | other.keys()) - {"reward.source", "objective.source"}):
            ours, theirs = main.get(field), other.get(field)
            if ours != theirs:
                raise ValueError(
                    f"{field} = {theirs!r} in process {number}, but {ours!r} in process 0; start all "
                    "processes of a run with the same config"
                )


def check_same(what: str, text: str) -> None:
    """Raises ValueError unless `text`, which describes `what` was read, is the same in all processes."""
    parts = [part["text"].item() for part in multihost.gather(what, text=text)]
    if differing := [str(i) for i, part in enumerate(parts) if part != parts[0]]:
        raise ValueError(
            f"{what}: those of process {', '.join(differing)} differ from those of process 0; all "
            "processes must read the same files"
        )


def check_plugins(
    config: FrozenConfigDict, reward: rewards.Reward, problems: Sequence[data.Problem]
) -> None:
    """Checks a reward plug-in on a problem, and that all processes have the same sources.

    Raises:
      BadInput: the reward fails, or the source of a plug-in differs between hosts.
    """
    for section in ("reward", "objective"):
        path = config[section].path
        if not path:
            continue
        hashes = {
            part["source"].item(): part["host"].item()
            for part in multihost.gather(
                f"{section}.path", source=config[section].source, host=socket.gethostname()
            )
        }
        if len(hashes) > 1:
            sources = ", ".join(f"{hash} on {host}" for hash, host in hashes.items())
            raise BadInput(
                f"{section}.path = {path!r}: the source differs between hosts: {sources}"
            )
    for field, conflicts in (
        ("train.shuffle_rewards = True", config.train.shuffle_rewards),
        ("objective.baseline = 'otb'", config.objective.baseline == "otb"),
        (
            f"objective.name = {config.objective.name!r}",
            OBJECTIVES[config.objective.name].fixed_aggregation,
        ),
    ):
        if reward.per_token and conflicts:
            raise BadInput(
                f"{field} needs rewards per response, but reward.path = "
                f"{config.reward.path!r} rewards tokens"
            )
    if config.reward.path and problems:
        try:
            rewards.check_reward(reward, problems[0].prompt, problems[0].answer)
        except ValueError as error:
            raise BadInput(f"reward.path = {config.reward.path!r}: {error}") from error


def check_vocabulary(
    config: FrozenConfigDict, tokenizer: data.CharTokenizer | data.TextTokenizer
) -> None:
    """Raises BadInput if the tokenizer, or a token that ends a response, exceeds model.vocab_size."""
    size = config.model.vocab_size
    if tokenizer.vocab_size > size:
        raise BadInput(
            f"model.vocab_size = {size}: must be at least the tokenizer's {tokenizer.vocab_size}"
        )
    if beyond := [token for token in tokenizer.stop_ids if token >= size]:
        raise BadInput(
            f"{config.data.tokenizer or config.model.path}: eos_token_id in generation_config.json "
            f"contains {', '.join(map(str, beyond))}, but the model's token ids are 0 to {size - 1}"
        )
