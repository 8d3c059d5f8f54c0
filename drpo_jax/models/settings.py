"""The architecture (`ModelConfig`), how it is computed (`Compute`), and their config sections."""

import dataclasses

import jax

from drpo_jax.fields import NOT_NEGATIVE, OPERATIONAL, POSITIVE, POSITIVE_SHARE, REQUIRED, field
from drpo_jax.precision.recipes import MatmulRecipe


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the model computes. Sizes are counts of scalars."""

    vocab_size: int = field(
        151936, "Rows of the embedding; at least the tokenizer's size.", POSITIVE, argument=REQUIRED
    )
    hidden_size: int = field(1024, "Model width.", POSITIVE, argument=REQUIRED)
    layers: int = field(28, "Number of layers.", POSITIVE, argument=REQUIRED)
    heads: int = field(16, "Query heads.", POSITIVE, argument=REQUIRED)
    kv_heads: int = field(8, "Key/value heads; divides heads.", POSITIVE, argument=REQUIRED)
    head_dim: int = field(128, "Width of a head; even (rotary pairs).", POSITIVE, argument=REQUIRED)
    mlp_size: int = field(
        3072, "Inner width of the dense MLP; 0 for a mixture of experts.", NOT_NEGATIVE, argument=0
    )
    experts: int = field(0, "Experts per layer; 0: dense.", NOT_NEGATIVE)
    experts_per_token: int = field(0, "Experts that each token visits.", NOT_NEGATIVE)
    expert_size: int = field(0, "Inner width of one expert.", NOT_NEGATIVE)
    rope_theta: float = field(1e6, "Base of the rotary frequencies.", POSITIVE)
    rms_eps: float = field(1e-6, "Epsilon of the RMS norms.", POSITIVE)
    tie_embeddings: bool = field(False, "The output head is the embedding's transpose.")
    attention_bias: bool = field(False, "Biases of q, k and v (Qwen2).")
    qk_norm: bool = field(True, "RMS norm of every query and key head (Qwen3).")
    attention_gate: bool = field(
        False, "q_proj also emits a gate σ(·) of the attention's output (Qwen3.5)."
    )
    rotary_fraction: float = field(
        1.0, "Share of a head's channels that are rotated.", POSITIVE_SHARE
    )
    norm_offset: float = field(
        0.0,
        "RMS norms multiply by this offset plus their scale; 1: zero-centered scales (Qwen3.5).",
        NOT_NEGATIVE,
    )
    shared_expert_size: int = field(
        0, "Inner width of the expert that all tokens visit; 0: none.", NOT_NEGATIVE
    )
    full_attention_every: int = field(
        1, "n: layers n, 2n, … use full attention; the others are gated DeltaNets.", POSITIVE
    )
    linear_key_heads: int = field(0, "Key heads of a DeltaNet.", NOT_NEGATIVE)
    linear_value_heads: int = field(
        0, "Value heads of a DeltaNet; a multiple of linear_key_heads.", NOT_NEGATIVE
    )
    linear_key_dim: int = field(0, "Width of a DeltaNet's key head.", NOT_NEGATIVE)
    linear_value_dim: int = field(0, "Width of a DeltaNet's value head.", NOT_NEGATIVE)
    linear_conv_kernel: int = field(
        4, "Tokens in the window of a DeltaNet's convolution.", POSITIVE
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings(ModelConfig):
    """The section `model`."""

    path: str = field(
        "",
        "Hugging Face directory, or hub id such as Qwen/Qwen3-4B-Base, to start from; it sets the "
        "architecture and overrides the fields of this section. Empty: random weights.",
        may_change=True,
    )
    load_balance: float = field(
        0.0, "Coefficient of the auxiliary load-balancing loss of experts; 0: off.", NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is computed; `ModelConfig` describes what it computes.

    Config fields are described where they are defined.

    Attributes:
      matmul: how the FP8 recipe treats the matmuls of this side (sampler or learner).
      one_segment: asserts that every row holds a single segment that starts in the first column and
        is followed only by padding (neither packed nor right-aligned). cudnn requires it and
        returns wrong results otherwise.
      platform: platform of the devices, "cpu", "gpu" or "tpu"; "" is JAX's default backend.
      sampling: whether the weights are the sampler's, laid out by `parallel.SAMPLER_RULES`.
    """

    dtype: str = field(
        "float32",
        "Dtype of activations, and of weights as they enter a matmul. Master weights, norms, router, "
        "softmax and logits are always float32.",
        ("float32", "bfloat16"),
    )
    matmul: MatmulRecipe = MatmulRecipe()
    remat: str = field(
        "none",
        "Activations kept for the backward pass: none: all of them; dots: outputs of the matmuls; "
        "full: only the layers' inputs. dots and full also keep the experts that tokens visit.",
        ("none", "dots", "full"),
    )
    unroll: int = field(
        1,
        "Layers per step of the learner's scan over layers. 1 compiles fastest; on CPU a small model "
        "runs a third faster with all of them.",
        POSITIVE,
    )
    grouped_matmul: str = field(
        "auto",
        "Kernel for the experts' matmul: blocked (blocks of rows in a loop; on a single device, most "
        "rows in one batched matmul instead), ragged_dot, or megablox (ragged_dot with the weight "
        "gradient from a Pallas kernel for TPU, where XLA would expand it to a dense matmul over all "
        "local experts). auto: blocked on CPU, where ragged_dot computes every expert for every row; "
        "megablox on TPU; ragged_dot elsewhere.",
        ("auto", "blocked", "ragged_dot", "megablox"),
    )
    attention: str = field(
        "auto",
        "Attention kernel for whole sequences. full computes all scores at once; the others "
        "need memory linear in the length: chunked (any device), splash (TPU; bfloat16, heads of 64, "
        "128 or 256), cudnn (GPU; bfloat16; packed or right-aligned rows use chunked instead). auto: "
        "full up to 512 tokens (128 on CPU), then splash or cudnn where possible, else chunked.",
        ("auto", "full", "chunked", "splash", "cudnn"),
    )
    one_segment: bool = False
    platform: str = ""
    sampling: bool = False

    def device(self) -> str:
        """Returns the platform of the devices."""
        return self.platform or jax.default_backend()

    def on_cpu(self) -> bool:
        """Returns whether the devices are CPUs."""
        return self.device() == "cpu"

    def grouped_kernel(self) -> str:
        """Returns the kernel of the experts' matmul, with "auto" resolved."""
        if self.grouped_matmul != "auto":
            return self.grouped_matmul
        return {"cpu": "blocked", "tpu": "megablox"}.get(self.device(), "ragged_dot")


@dataclasses.dataclass(frozen=True)
class ComputeSettings(Compute):
    """The section `compute`."""

    compilation_cache: str = field(
        "auto",
        "Directory of JAX's persistent compilation cache. auto: JAX_COMPILATION_CACHE_DIR where it is "
        "set, else ~/.cache/drpo_jax/jax. Empty: no cache.",
        **OPERATIONAL,
    )
    shared_programs: bool = field(
        False,
        "Whether the learning rate and the numbers of the objective (delta, epsilon, …) are inputs of "
        "the compiled programs instead of constants, so that runs that differ in nothing else share "
        "them. Results may differ in the last bits.",
    )
