"""The architectures of the released models that the configs train.

A run that starts from a checkpoint reads the architecture from the checkpoint's config.json. The
presets serve random weights, `preflight` and checks. The preset of Qwen3.5 is its language model
without the vision tower.
"""

from drpo_jax.models.settings import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    "qwen3-4b": ModelConfig(
        vocab_size=151936,
        hidden_size=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_size=9728,
        rope_theta=1e6,
        tie_embeddings=True,
    ),
    "qwen3-30b-a3b": ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        experts=128,
        experts_per_token=8,
        expert_size=768,
        rope_theta=1e6,
    ),
    "qwen3.5-35b-a3b": ModelConfig(
        vocab_size=248320,
        hidden_size=2048,
        layers=40,
        heads=16,
        kv_heads=2,
        head_dim=256,
        experts=256,
        experts_per_token=8,
        expert_size=512,
        shared_expert_size=512,
        rope_theta=1e7,
        rotary_fraction=0.25,
        norm_offset=1.0,
        attention_gate=True,
        full_attention_every=4,
        linear_key_heads=16,
        linear_value_heads=32,
        linear_key_dim=128,
        linear_value_dim=128,
        linear_conv_kernel=4,
    ),
    "r1-distill-qwen-1.5b": ModelConfig(
        vocab_size=151936,
        hidden_size=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=128,
        mlp_size=8960,
        rope_theta=1e4,
        attention_bias=True,
        qk_norm=False,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_size=1536,
        rope_theta=1e5,
        rms_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
    ),
}
