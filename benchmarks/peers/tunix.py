"""Workers: Tunix's Sampler and RL trainer, or whole steps of its GRPOLearner.

An update is `RLCluster.update_actor` on micro-batches with the GRPO loss, which is what GRPOLearner
calls. The learner owns its loop, so its data set waits for the next request when the learner fetches
prompts; the trainer waits for its computations before that. The end of a sequence and the padding are
tokens outside the model's vocabulary, so that no response stops early. On CPU, Tunix's Qwen3 computes
every expert of a mixture for every token.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerFast
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers import protocol, work

PACKAGES = "google-tunix", "jax", "jaxlib", "flax", "optax"
STEPS = 1_000_000  # More than are ever requested.
Roles = rl_cluster.Role


class Trainer:
    """A GRPOLearner with its cluster, and a sampler.

    Args:
      task: shape, directory and settings, see `contenders.Contender`. Settings: micro_batch.
    """

    def __init__(self, task: dict[str, Any]):
        self.shape, self.directory = work.Shape(**task["shape"]), Path(task["directory"])
        self.micro_batch = task["settings"]["micro_batch"]
        self.rewards = work.Rewards(self.shape.response)
        self.mesh = jax.make_mesh(
            (1, 1),
            ("fsdp", "tp"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices()[:1],
        )
        # Both special tokens get ids after the vocabulary of the model.
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(self.directory / "model/tokenizer.json"),
            eos_token="<eos>",
            pad_token="<pad>",
        )
        self.prompts = work.read_prompts(self.directory)
        self.length = self.shape.prompt + self.shape.response
        with self.mesh:
            self.model = self._load()
            self.cluster = rl_cluster.RLCluster(
                actor=self.model, tokenizer=self.tokenizer, cluster_config=self._cluster_config()
            )
            self.learner = GRPOLearner(
                rl_cluster=self.cluster,
                reward_fns=self._reward,
                algo_config=GRPOConfig(
                    num_generations=self.shape.samples, beta=0.0, epsilon=work.EPSILON
                ),
            )

    def _reward(self, prompts, completions, **_):
        return self.rewards(completions)

    def _load(self):
        """Loads the model; the sizes have other names."""
        shape = self.shape
        config = ModelConfig(
            num_layers=shape.layers,
            vocab_size=work.VOCABULARY,
            embed_dim=shape.hidden_size,
            hidden_dim=shape.mlp_size or shape.expert_size,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.kv_heads,
            rope_theta=1_000_000,
            norm_eps=1e-6,
            num_experts=shape.experts or None,
            num_experts_per_tok=shape.experts_per_token or None,
        )
        path = str(self.directory / "model")
        return create_model_from_safe_tensors(path, config, self.mesh, dtype=jnp.float32)

    def _cluster_config(self):
        """Returns the config of trainer and rollouts; sizes of batches are numbers of prompts."""
        shape = self.shape
        micro_prompts = max(self.micro_batch // shape.samples, 1)

        def matrices(tree):
            return jax.tree.map(lambda x: x.ndim > 1, tree)

        optimizer = optax.chain(
            optax.clip_by_global_norm(work.CLIP_NORM),
            optax.adamw(
                work.LEARNING_RATE, work.B1, work.B2, work.EPS,
                weight_decay=work.WEIGHT_DECAY, mask=matrices,
            ),
        )  # fmt: skip
        return rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((Roles.ACTOR, Roles.REFERENCE, Roles.ROLLOUT), self.mesh),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=STEPS,
                max_steps=STEPS,
                mini_batch_size=shape.prompts,
                train_micro_batch_size=micro_prompts,
                rollout_micro_batch_size=shape.prompts,
                compute_logps_micro_batch_size=shape.prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=shape.response,
                max_prompt_length=shape.prompt,
                kv_cache_size=self.length,
                temperature=1.0,
                top_p=1.0,
            ),
        )


class Parts:
    """Sampling and updates on one model; call it inside `trainer.mesh`.

    Args:
      trainer: the trainer.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, shape = trainer, trainer.shape
        cache = CacheConfig(trainer.length, shape.layers, shape.kv_heads, shape.head_dim)
        self._sampler = Sampler(trainer.model, trainer.tokenizer, cache)
        self._batch = work.Batch.load(trainer.directory)
        self._prompts = [p for p in trainer.prompts[: shape.prompts] for _ in range(shape.samples)]
        self._calls = 0

    def score(self) -> dict[str, Any]:
        """Returns the logprobs of the given tokens before any update."""
        graph, state = self._sampler.model_def_and_state()
        tokens, pieces = self._trainer.tokenizer, []
        for example in self._examples():
            logp = common.compute_per_token_logps(
                graph, state, example.prompt_ids, example.completion_ids,
                pad_id=tokens.pad_token_id, eos_id=tokens.eos_token_id,
            )  # fmt: skip
            pieces.append(np.asarray(logp))
        return {"logp": np.concatenate(pieces).tolist()}

    def sample(self) -> dict[str, Any]:
        """Samples with logprobs."""
        out = self._sample(return_logprobs=True)
        return {
            "tokens": sum(map(len, out.tokens)),
            "mean_logp": float(np.mean(np.concatenate(out.logprobs))),
        }

    def sample_tokens(self) -> dict[str, Any]:
        """Samples tokens alone."""
        return {"tokens": sum(map(len, self._sample(return_logprobs=False).tokens))}

    def _sample(self, return_logprobs: bool):
        self._calls += 1
        shape = self._trainer.shape
        return self._sampler(
            self._prompts,
            max_generation_steps=shape.response,
            max_prompt_length=shape.prompt,
            temperature=1.0,
            top_p=1.0,
            seed=self._calls,
            return_logprobs=return_logprobs,
        )

    def update(self) -> dict[str, Any]:
        """Makes one optimizer update on the given tokens."""
        trainer, losses = self._trainer.cluster.actor_trainer, []
        buffer = trainer._buffer_metrics  # The only place that sees the loss of the current update.

        def watch(metrics, loss, *rest, **named):
            losses.append(loss)
            return buffer(metrics, loss, *rest, **named)

        trainer._buffer_metrics = watch
        try:
            self._trainer.cluster.update_actor(self._examples(), None)
        finally:
            trainer._buffer_metrics = buffer
        return {"loss": float(np.mean(np.asarray(losses)))}

    def _examples(self) -> list[TrainExample]:
        """Returns the micro-batches of the given tokens."""
        prompt, batch, size = self._trainer.shape.prompt, self._batch, self._trainer.micro_batch
        examples = []
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            tokens = jnp.asarray(batch.tokens[rows], jnp.int32)
            examples.append(
                TrainExample(
                    prompt_ids=tokens[:, :prompt],
                    prompt_mask=jnp.ones_like(tokens[:, :prompt], bool),
                    completion_ids=tokens[:, prompt:],
                    completion_mask=jnp.ones_like(tokens[:, prompt:], bool),
                    advantages=jnp.asarray(batch.advantage[rows]),
                    ref_per_token_logps=None,
                    old_per_token_logps=jnp.asarray(batch.old_logp[rows]),
                )
            )
        return examples


def serve_steps(server: protocol.Server, trainer: Trainer) -> None:
    """Serves steps of GRPOLearner."""

    def batches() -> Iterator[dict[str, Any]]:
        server.ready()
        size, first = trainer.shape.prompts, 0
        while server.receive() is not None:
            # Stays inside the list of prompts, whose length the batch divides.
            start = first % len(trainer.prompts)
            yield {"prompts": np.array(trainer.prompts[start : start + size])}
            first += size
            server.reply(trainer.rewards.read())

    with trainer.mesh:
        trainer.learner.train(batches())


def main(task: dict[str, Any]) -> None:
    """Serves the work of a task."""
    server, trainer = protocol.Server(PACKAGES), Trainer(task)
    if task["works"] == ["step"]:
        serve_steps(server, trainer)
        return
    with trainer.mesh:
        parts = Parts(trainer)
        names = "score", "sample", "sample_tokens", "update"
        server.serve({name: getattr(parts, name) for name in names})


if __name__ == "__main__":
    protocol.run(main)
