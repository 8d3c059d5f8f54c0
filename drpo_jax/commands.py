"""The commands of `drpo`: one row each. Each module also runs on its own as `python -m MODULE`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`.

    Attributes:
      module: The entry point; `drpo COMMAND` runs it as `python -m` does.
      summary: What the command does, in one line.
      arguments: What follows the command, for its --help.
      examples: Command lines for its --help.
    """

    module: str
    summary: str
    arguments: str
    examples: tuple[str, ...]


RUN = "--config=FILE[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...]"
COMMANDS = {
    "train": Command(
        "drpo_jax.train",
        "Train a language model by reinforcement learning; the same command resumes.",
        f"{RUN} [--compare=NAME] [--replay=DIR]",
        (
            "drpo train --config=configs/tiny.py --workdir=runs/tiny",
            "drpo train --config=configs/tiny.py:bf16 --workdir=runs/grpo "
            "--config.objective.name=grpo",
            "drpo train --config=configs/tiny.py --workdir=runs/tiny --compare=surrogate",
            "drpo train --config=configs/tiny.py --workdir=runs/again --replay=runs/tiny/rollouts",
        ),
    ),
    "sft": Command(
        "drpo_jax.sft",
        "Fine-tune on files, on the correct responses of a run, or on demonstrations.",
        f"{RUN} [--from_rollouts=DIR]",
        (
            "drpo sft --config=configs/tiny.py --workdir=runs/warm",
            "drpo sft --config=configs/own.py --workdir=runs/chats --config.sft.files=chats.jsonl "
            "--config.sft.epochs=3",
            "drpo sft --config=configs/tiny.py --workdir=runs/again --from_rollouts=runs/tiny",
            "drpo train --config=configs/tiny.py --workdir=runs/tiny "
            "--config.data.init_from=runs/warm",
        ),
    ),
    "evaluate": Command(
        "drpo_jax.evaluate",
        "Measure held-out accuracy: avg@k, pass@k and maj@k with confidence intervals.",
        RUN,
        (
            "drpo evaluate --config=configs/tiny.py --workdir=runs/tiny",
            "drpo evaluate --config=configs/qwen3_4b_base.py --workdir=runs/base "
            "--config.model.path=Qwen/Qwen3-4B-Base --config.evaluate.sets=aime24,aime25",
        ),
    ),
    "score": Command(
        "drpo_jax.score",
        "Add a model's logprobs to a rollout file and compare them with the engine's.",
        f"{RUN} --rollouts=FILE --output=FILE.parquet",
        (
            "drpo score --config=configs/tiny.py --workdir=runs/tiny "
            "--rollouts=runs/tiny/rollouts/step_000020.npz --output=scored.parquet",
        ),
    ),
    "compare": Command(
        "drpo_jax.compare",
        "Compare objectives on the same rollouts: gradient norms, cosines, masks, Σ|c| by µ.",
        f"{RUN} --rollouts=FILE [--objectives=NAME,NAME] [--output=FILE.html]",
        (
            "drpo compare --config=configs/tiny.py --workdir=runs/tiny "
            "--rollouts=runs/tiny/rollouts/step_000020.npz --objectives=drpo,grpo,dppo_tv "
            "--output=comparison.html",
        ),
    ),
    "report": Command(
        "drpo_jax.report",
        "Write one self-contained HTML page that compares runs.",
        "--workdir=DIR [--workdir=DIR ...] --output=FILE.html",
        (
            "drpo report --workdir=runs/tiny --output=report.html",
            "drpo report --workdir=runs/drpo --workdir=runs/grpo --output=comparison.html",
        ),
    ),
    "preflight": Command(
        "drpo_jax.preflight",
        "Compile a run for a TPU slice and report whether it fits; no TPU required.",
        "--config=FILE[:VARIANT] --topology=SLICE [--lengths=LENGTHS] [--config.FIELD=VALUE ...]",
        (
            "drpo preflight --config=configs/qwen3_4b_base.py --topology=v6e:4x4",
            "drpo preflight --config=configs/qwen3_4b_base.py --topology=v6e:4x4 "
            "--lengths=mean:1500,max:8192",
            "drpo preflight --config=configs/tiny.py --topology=cpu:8",
        ),
    ),
    "export": Command(
        "drpo_jax.export",
        "Write a checkpoint of a run as a Hugging Face directory.",
        "--workdir=DIR --output=DIRECTORY",
        (
            "drpo export --workdir=runs/smollm2 --output=models/smollm2-drpo",
            "drpo export --workdir=runs/smollm2 --output=models/step25 --step=25 --dtype=float32",
        ),
    ),
    "convert": Command(
        "drpo_jax.convert",
        "Convert a GGUF file to a Hugging Face directory, or a saved rollout to Parquet.",
        "FILE.gguf DIRECTORY | FILE.npz FILE.parquet",
        (
            "drpo convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m",
            "drpo convert runs/tiny/rollouts/step_000020.npz step_000020.parquet",
        ),
    ),
    "list": Command(
        "drpo_jax.listing",
        "List the config fields, objectives, rewards, variants or metrics.",
        "fields|metrics|objectives|rewards|variants [WORD]",
        (
            "drpo list objectives",
            "drpo list fields sampler",
            "drpo list rewards my_rewards.py:judge",
        ),
    ),
}
