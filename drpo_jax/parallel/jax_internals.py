"""All private API of jax that drpo_jax uses.

`jax.distributed` is the public interface to jax's coordination service, but in jax 0.10.2 to 0.11.2 it
offers no way to

* use the service's key-value store and barriers, which `multihost.gather` needs (Orbax uses the same
  private client);
* read the process ids that the processes were started with (`jax.process_index()` may number them
  differently on a TPU);
* limit how long the service waits for processes to register. Unless this limit is shorter than the
  clients' `initialization_timeout`, the error does not name the missing processes;
* detect that this host belongs to a TPU slice of several hosts before joining it.

Single-process runs use `tpu_cluster` only. All private names are imported on first use and are listed in
`NAMES`. `tests/parallel/test_jax_internals.py` checks them against the installed jax.
"""

import functools
import importlib
import operator
from types import ModuleType
from typing import Any

import jax

# Minor releases of jax with which the tests of this package have passed.
CHECKED = ("0.10", "0.11")

# Private names by module, with the functions below that use them.
NAMES = {
    "jax._src.distributed": {
        "global_state.client": "client",
        "global_state.process_id": "process_id",
        "global_state.num_processes": "process_count",
        "_jax.get_distributed_runtime_service": "initialize",
    },
    "jax._src.clusters.cloud_tpu_cluster": {
        "GceTpuCluster.is_env_present": "tpu_cluster",
        "GceTpuCluster.get_process_count": "tpu_cluster",
        "GkeTpuCluster.is_env_present": "tpu_cluster",
        "GkeTpuCluster.get_process_count": "tpu_cluster",
    },
}
ADVICE = (
    f"jax {jax.__version__} has moved private API that drpo_jax/parallel/jax_internals.py uses. "
    f"Install jax {' or '.join(CHECKED)}, or update that file: each function there says what it needs. "
    "A public replacement in jax is better than a new private name. Then run tests/parallel and add the "
    "release to CHECKED."
)


def missing_names() -> list[str]:
    """Returns those of `NAMES` that the installed jax lacks, each with the function that needs it."""
    missing = []
    for module, names in NAMES.items():
        for name, user in names.items():
            try:
                operator.attrgetter(name)(importlib.import_module(module))
            except (ImportError, AttributeError):
                missing.append(f"{module}.{name} (for {user})")
    return missing


def client() -> Any:
    """Returns this process's client of the coordination service: key-value store and barriers."""
    return _private("jax._src.distributed").global_state.client


def process_id() -> int:
    """Returns the id that this process was started with."""
    return _private("jax._src.distributed").global_state.process_id


def process_count() -> int:
    """Returns the number of processes of the run."""
    return _private("jax._src.distributed").global_state.num_processes


def initialize(register_timeout: int, **arguments: Any) -> None:
    """Calls `jax.distributed.initialize` with a limit on the time that processes take to register.

    Args:
      register_timeout: seconds after which the service gives up and names the missing processes. It
        must be shorter than `initialization_timeout` for that error to reach the other processes.
      arguments: keyword arguments of `jax.distributed.initialize`.
    """
    library = _private("jax._src.distributed")._jax
    start = library.get_distributed_runtime_service
    # `jax.distributed.initialize` does not pass this argument on.
    library.get_distributed_runtime_service = functools.partial(
        start, cluster_register_timeout=register_timeout
    )
    try:
        jax.distributed.initialize(**arguments)
    finally:
        library.get_distributed_runtime_service = start


def tpu_cluster() -> str | None:
    """Returns the `cluster_detection_method` of a TPU slice of several hosts, None elsewhere."""
    clusters = _private("jax._src.clusters.cloud_tpu_cluster")
    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        try:
            several = cluster.is_env_present() and cluster.get_process_count() > 1
        except OSError:  # no metadata server: a single-host TPU outside Google Cloud's VMs
            continue
        if several:
            return cluster.name
    return None


@functools.cache
def _private(module: str) -> ModuleType:
    if missing := missing_names():
        raise ImportError(f"missing: {', '.join(missing)}. {ADVICE}")
    return importlib.import_module(module)
