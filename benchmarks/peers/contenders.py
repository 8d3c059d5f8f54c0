"""The contenders, and the environments of the peers."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Worker, WorkerFailed
from benchmarks.peers.work import Shape
from drpo_jax import host_memory

# Distributions of each environment; ours is the one that runs the benchmark. The configuration of pip
# decides which build of PyTorch is installed; the CPU one is enough.
ENVIRONMENTS = {
    "torch": (
        "torch==2.13.0",
        "transformers==5.24.0",
        "trl==1.16.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
    ),
    "tunix": (
        "google-tunix==0.1.7",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
        "transformers==5.12.1",
    ),
}
PARTS = "sample", "sample_tokens", "update"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A worker process: who it is, and what it is asked to do.

    Attributes:
      name: key in the results.
      title: its name in tables.
      module: the worker, a module of this package.
      environment: a key of `ENVIRONMENTS`; "": the environment that runs the benchmark.
      works: its kinds of work.
      asked: what it is asked to do, for the results.
      tuned_as: the contender whose settings it takes; "": its own are tried out.
    """

    name: str
    title: str
    module: str
    environment: str
    works: tuple[str, ...]
    asked: str
    tuned_as: str = ""

    @property
    def ours(self) -> bool:
        """Whether this is a worker of this project."""
        return not self.environment

    def choices(self, shape: Shape) -> dict[str, list[Any]]:
        """Returns the values to try of each setting, one setting after the other.

        PyTorch has two more settings: the kernel of a mixture, and whether updates are compiled.
        """
        choices: dict[str, list[Any]] = {"micro_batch": list(shape.micro_batches)}
        if self.module != "pytorch":
            return choices
        kernels = {"experts": ["eager", "batched_mm", "grouped_mm"]} if shape.experts else {}
        return kernels | choices | {"compile": [False, True]}

    def start(
        self,
        shape: Shape,
        directory: Path,
        workdir: Path,
        settings: dict[str, Any],
        limit: float,
    ) -> Worker:
        """Starts the worker.

        Args:
          shape: the shape of the work.
          directory: the files of the shape.
          workdir: where environments, logs and compilation caches are.
          settings: a value for each of `choices`.
          limit: seconds to wait for a reply.
        """
        task = {
            "shape": dataclasses.asdict(shape),
            "directory": str(directory),
            "settings": settings,
            "works": self.works,
            "threads": os.cpu_count(),
        }
        variables = {
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "JAX_COMPILATION_CACHE_DIR": str(self.cache(directory)),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache(directory)),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.ours:
            variables |= host_memory.environment()  # As `drpo` itself does.
        python = workdir / self.environment / "bin/python" if self.environment else sys.executable
        module = f"benchmarks.peers.{self.module}"
        return Worker(python, module, task, directory / f"{self.name}.log", variables, limit)

    def cache(self, directory: Path) -> Path:
        """Returns the compilation cache of the contender for a shape."""
        return directory / "cache" / self.name


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "ours", "drpo_jax", "ours", "", PARTS,
            "Sampler.generate, which always records logprobs and entropy; Programs.policy_update",
        ),
        Contender(
            "pytorch", "PyTorch + transformers", "pytorch", "torch", PARTS,
            "generate with a cache, logprobs from output_logits; forward, backward, clip_grad_norm_ and "
            "fused AdamW in a loop over micro-batches, SDPA attention, logits of the response alone; "
            "torch.compile for updates if that is faster",
        ),
        Contender(
            "tunix", "Tunix", "tunix", "tunix", PARTS,
            "Sampler, with return_logprobs; RLCluster.update_actor with the GRPO loss",
        ),
        Contender(
            "ours-loop", "drpo_jax, the loop", "ours", "", ("step",),
            "loop.rl_step, which train calls: sample, verify in worker processes, update, metrics",
            tuned_as="ours",
        ),
        Contender(
            "trl", "TRL", "trl_grpo", "torch", ("step",),
            "GRPOTrainer with generate, without KL penalty, float32, no gradient checkpointing and no "
            "torch.compile",
            tuned_as="pytorch",
        ),
        Contender(
            "tunix-grpo", "Tunix, GRPOLearner", "tunix", "tunix", ("step",),
            "GRPOLearner with the vanilla rollout, without KL penalty",
            tuned_as="tunix",
        ),
    )
}  # fmt: skip


def install(environment: str, workdir: Path) -> None:
    """Makes the environment of a peer, unless the pinned versions are already installed.

    Raises:
      WorkerFailed: pip fails; the message names its log.
    """
    directory, pins = workdir / environment, ENVIRONMENTS[environment]
    done, log = directory / "pins.txt", workdir / f"{environment}.log"
    if done.exists() and done.read_text().split() == list(pins):
        return
    print(f"installing {', '.join(pins)} into {directory} …", flush=True)
    pip = [directory / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", *pins]
    workdir.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        for command in ([sys.executable, "-m", "venv", directory], pip):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
                raise WorkerFailed(f"{environment} cannot be installed; see {log}")
    done.write_text("\n".join(pins) + "\n")
