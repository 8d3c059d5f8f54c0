"""Writes a checkpoint as a Hugging Face directory: drpo export --workdir=DIR --output=DIRECTORY

The directory loads in `transformers`, vLLM and SGLang, and another run can start from it
(--config.model.path). It holds the weights in bfloat16 (--dtype) and the run's tokenizer, which replace
any weights and tokenizer that are already there.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from drpo_jax import cli
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.config import run_config
from drpo_jax.data import make_tokenizer
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.models import Transformer, save_pretrained
from drpo_jax.programs import model_config
from drpo_jax.storage import path_of


def export(
    workdir: str | Path, output: str | Path, step: int | None = None, dtype: str = "bfloat16"
) -> int:
    """Writes a checkpoint of the run in `workdir` to the directory `output`, through host memory.

    Args:
      workdir: Directory of the run.
      output: The output directory, created if necessary. Weights and a tokenizer in it are replaced.
      step: The checkpoint's step; the last one by default.
      dtype: Dtype of the weights, "bfloat16" or "float32".

    Returns:
      The checkpoint's step.

    Raises:
      BadInput: There is no run or no such checkpoint, or the directory cannot be written.
    """
    with bad_input():
        workdir, output = path_of(workdir), path_of(output)
    config = run_config(workdir)
    architecture = model_config(config)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = jax.eval_shape(lambda: Transformer(architecture, jax.random.key(0)))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host), abstract)
    with bad_input(), Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step is None or step not in checkpoints.steps():
            steps = ", ".join(map(str, checkpoints.steps())) or "none at all"
            raise BadInput(f"{workdir}: no checkpoint of step {step}; there are {steps}")
        source, tokenizer = config.model.path, config.data.tokenizer or config.model.path
        _check_output(output, source, tokenizer)
        model = checkpoints.restore(step, {"model": like})["model"]
        save_pretrained(
            model, architecture, output, jnp.dtype(dtype), source or None, tokenizer or None
        )
        if tokenizer:
            _write_stop_tokens(output / "generation_config.json", config)
    return step


def _check_output(output: Path, source: str, tokenizer: str) -> None:
    """Raises BadInput if the output directory holds the run's own files or an unrelated tokenizer."""
    for path, kind in ((source, "model that the run started from"), (tokenizer, "run's tokenizer")):
        if path and path_of(path).resolve() == output.resolve():
            raise BadInput(f"{output} is the {kind}: name another directory")
    if not tokenizer and (output / "tokenizer.json").exists():
        raise BadInput(
            f"{output} contains a tokenizer, but this run's tokens are single characters: name another "
            "directory"
        )


def _write_stop_tokens(path: Path, config: ConfigDict) -> None:
    """Makes other engines stop at the tokens that ended a response in training.

    In a chat with a base model they differ from those of the model's own file.
    """
    tokenizer = make_tokenizer(config.data, config.model.path)
    fields = json.loads(path.read_text()) if path.exists() else {}
    fields["eos_token_id"] = list(tokenizer.stop_ids)
    path.write_text(json.dumps(fields, indent=2) + "\n")


def main(workdir: str | None, output: str | None, step: int | None, dtype: str) -> None:
    """Exports on the CPU, since a run may hold the accelerators. Raises like `export`."""
    if not workdir:
        raise BadInput("--workdir=DIR is missing, for example --workdir=runs/first")
    if not output:
        raise BadInput("--output=DIRECTORY is missing, for example --output=models/trained")
    jax.config.update("jax_platforms", "cpu")
    step = export(workdir, output, step, dtype)
    print(f"{output}: step {step} of {workdir}, {dtype}")


def launch() -> None:
    """Defines the flags and runs `main`."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.")
    output = flags.DEFINE_string("output", None, "Directory to write; created if it is missing.")
    step = flags.DEFINE_integer("step", None, "Step of the checkpoint; the last one by default.")
    dtype = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of the weights.")

    def start(arguments: list[str]) -> None:
        cli.refuse_arguments(arguments)
        main(workdir.value, output.value, step.value, dtype.value)

    cli.run(start)


if __name__ == "__main__":
    launch()
