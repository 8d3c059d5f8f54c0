r"""Your own model, problems and reward: a complete example to copy.

    cp configs/own.py configs/mine.py     # then change the five places marked "Yours"
    drpo train --config=configs/mine.py --workdir=runs/mine
    drpo evaluate --config=configs/mine.py --workdir=runs/mine

A file of problems has one JSON object per line. `prompt` and `answer` are required. `kind`, which groups
problems in tables, and `id` are optional:

    {"prompt": "What is 12 + 34?", "answer": "46", "kind": "sums", "id": "p1"}

Every field can also be set on the command line (--config.train.steps=20), and `drpo list fields`
explains all of them. Before a long run, check whether it fits on the devices, which need not be present:

    drpo preflight --config=configs/mine.py --topology=v5e:2x4

Variants, separated by commas: long; and those of every config (drpo_jax/config/variants.py): objectives,
readings of the threshold, smoke.
"""

from drpo_jax.config import default_config
from drpo_jax.config.variants import with_variants
from drpo_jax.rewards import REWARDS, Reward


# Yours: the reward. It takes three strings and returns a number; 1 is right, 0 is wrong. A response is
# arbitrary text from a model: never execute it, raise no exception, and take time linear in its length.
def last_line(prompt: str, response: str, answer: str) -> float:
    """Returns 1.0 if the last line of the response is the answer, else 0.0."""
    lines = response.strip().splitlines() or [""]
    return float(lines[-1].strip() == answer)


# With a template, a run first checks that a response with the right answer is rewarded.
REWARDS["last_line"] = Reward(
    last_line, summary="the last line is the answer", template="Therefore:\n{answer}"
)

VARIANTS = {"long": {"train.steps": 1000, "sampler.max_response_length": 4096}}


def get_config(variants=""):
    config = default_config()

    # Yours: the model, a hub id or a directory with config.json, safetensors and a tokenizer. It sets
    # the architecture. Families: Llama, Qwen2, Qwen3, Qwen3-MoE, Qwen3.5-MoE.
    config.model.path = "Qwen/Qwen3-0.6B"

    # Yours: the problems to train on. A name in drpo_jax.data.SETS, such as gsm8k, works as well.
    config.data.problems = "train.jsonl"
    config.data.filter = "clean"  # Drops problems that are repeated, contradictory or too long.
    config.reward.name = "last_line"

    # Yours: the problems to evaluate on, files or names in drpo_jax.data.SETS, separated by commas.
    # Empty: evaluate.problems of the training problems are held out instead.
    config.evaluate.sets = "test.jsonl"
    config.evaluate.every = 20
    config.evaluate.samples = 4

    # Yours: the prompt. Base models without a chat template need chat = False.
    config.data.instruction = "{problem}\nEnd with a line that holds the answer and nothing else."
    config.data.chat = True
    config.data.thinking = "off"

    # Lengths in tokens. data.filter drops longer prompts; longer responses are cut off.
    config.sampler.max_prompt_length = 512
    config.sampler.max_response_length = 1024
    config.sampler.slots = 64

    # A rollout has 16 prompts with 8 responses each. It serves 16 / 8 = 2 optimizer updates, each
    # of which accumulates gradients over micro-batches of 16 sequences.
    config.train.steps = 200
    config.train.prompts = 16
    config.train.samples = 8
    config.train.mini_batch_prompts = 8
    config.train.micro_batch = 16
    config.train.pack = True
    config.optimizer.learning_rate = 1e-6

    # Weights, gradients and both moments are float32: 16 bytes per parameter, split over all devices.
    config.mesh.update(data=1, fsdp=-1)
    config.compute.update(dtype="bfloat16", remat="full")
    return with_variants(config, variants, VARIANTS)
