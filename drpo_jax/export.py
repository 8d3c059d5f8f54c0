"""A run's model as a Hugging Face directory: python -m drpo_jax.export --workdir=DIR --output=DIRECTORY

Writes the last checkpoint of the run, or the one of --step, in bfloat16 (--dtype), with the tokenizer of
model.path: for `transformers`, vLLM or SGLang, or for another run to start from.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from drpo_jax.checkpoint import Checkpoints
from drpo_jax.cli import exit_with
from drpo_jax.config import run_config
from drpo_jax.data import make_tokenizer
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.models import Transformer, save_pretrained
from drpo_jax.programs import model_config


def export(workdir, output, step=None, dtype="bfloat16"):
    """Writes the directory, through host memory. → the checkpoint's step.

    Raises:
      BadInput: no run, no such checkpoint, or a directory that cannot be written.
    """
    workdir = Path(workdir).expanduser()
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
        model = checkpoints.restore(step, {"model": like})["model"]
        source = config.model.path or None
        if source and Path(source).resolve() == Path(output).resolve():
            raise BadInput(f"{output} is what the run began with: name another directory")
        save_pretrained(model, architecture, output, jnp.dtype(dtype), source)
        if source:
            _write_ends(Path(output) / "generation_config.json", config)
    return step


def _write_ends(path, config):
    """What ended a response in training ends it in other engines too: in a chat, of a base model, that
    is not what the original file says."""
    tokenizer = make_tokenizer(config.data, config.model.path)
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(
        json.dumps(fields | {"eos_token_id": list(tokenizer.stop_ids)}, indent=2) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--output", type=Path, required=True, help="made if it is not there")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the last one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a run may hold the accelerators
    try:
        step = export(args.workdir, args.output, args.step, args.dtype)
    except BadInput as error:
        exit_with(error, 2)
    print(f"{args.output}: step {step} of {args.workdir}, {args.dtype}")


if __name__ == "__main__":
    main()
