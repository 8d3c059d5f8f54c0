"""The smallest config that goes through everything: for the tests of the loop and the command line."""

from drpo_jax.config import default_config
from drpo_jax.data import CharTokenizer, max_prompt_length, max_response_length


def get_config():
    config = default_config()
    config.model.update(
        vocab_size=CharTokenizer.vocab_size, hidden_size=32, layers=2, heads=2, kv_heads=2,
        head_dim=16, mlp_size=0, experts=4, experts_per_token=2, expert_size=32, rope_theta=1e4,
        load_balance=0.01,
    )  # fmt: skip
    config.data.digits, config.data.operations = 2, "+-"
    config.sampler.max_prompt_length = max_prompt_length(config.data)
    config.sampler.max_response_length = max_response_length(config.data)
    config.sampler.slots, config.sampler.decode_steps = 16, 32
    config.precision.recipe = "rollout"
    config.objective.delta = 0.01
    config.optimizer.learning_rate = 3e-3
    config.sft.update(steps=4, batch=16, micro_batch=16, learning_rate=1e-2, warmup_steps=1)
    config.train.update(
        steps=4, prompts=4, samples=4, mini_batch_prompts=2, micro_batch=8, save_rollout_every=2
    )
    config.evaluate.update(problems=6, samples=2)
    config.checkpoint.every = 2
    return config
