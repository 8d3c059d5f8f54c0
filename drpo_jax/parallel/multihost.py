"""Several processes as one run: plain `jax.distributed`, and what their hosts tell each other.

Every process runs the same program, and its device arrays are global. What is known on one host only
(verdicts, errors, the contents of a file) crosses through the key-value store of jax's coordinator,
which is process 0: `gather`, and `barrier`, a gather of nothing. Both end after a timeout, with an error
that names the processes that did not come. A process that dies is noticed within 100 seconds wherever
the others are: jax then ends them and names it.

Process numbers are those that the processes were started with (JAX_PROCESS_ID, or the TPU's worker
number), not `jax.process_index()`, which a TPU may order otherwise.
"""

import collections
import functools
import io
import os
import socket
import sys
import time
from typing import NoReturn

import jax
import numpy as np

# jax has no public door to its coordinator; Orbax goes through this one as well.
from jax._src import distributed
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster
from jax.experimental import multihost_utils

# jax reads the first by itself and has no names for the others.
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = 600  # seconds: more than one host may reasonably lag behind another
START_TIMEOUT = 300  # seconds, from the first process to the last
LAST_WORDS = 2  # seconds that the coordinator's process outlives an error

_calls = collections.Counter()  # by name: of `gather`


class MissingProcess(RuntimeError):
    """Other processes of the run did not come; the message names them."""


def initialize(timeout_seconds: float = START_TIMEOUT) -> None:
    """Makes this process one of several, where it is; to be called before JAX computes anything.

    The hosts of a TPU slice (TPU VMs, GKE) are found by jax itself. Anywhere else the environment
    says it, the same three variables for every process: JAX_COORDINATOR_ADDRESS (host:port, where
    process 0 listens), JAX_NUM_PROCESSES, JAX_PROCESS_ID (from 0). Without them the process is
    alone, and nothing happens. CPU devices then exchange data by Gloo, which is jax's default.

    When some processes have not come after `timeout_seconds`, jax ends the others and gives the
    numbers of the missing ones.

    Raises:
      ValueError: some of the variables are missing, or not what they should be.
    """
    if jax.distributed.is_initialized():
        return
    found = _from_environment()
    found = _from_tpu() if found is None else found
    if not found:
        return
    # Else SIGTERM would only be noted, and a preempted or killed process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    # Without a limit of its own the coordinator cannot say which processes it waits for; jax has no
    # argument for it. The limit of those who wait is longer, so that they are told.
    start = distributed._jax.get_distributed_runtime_service
    limited = functools.partial(start, cluster_register_timeout=int(timeout_seconds))
    distributed._jax.get_distributed_runtime_service = limited
    try:
        jax.distributed.initialize(**found, initialization_timeout=int(timeout_seconds) + 30)
    finally:
        distributed._jax.get_distributed_runtime_service = start
    client, number = distributed.global_state.client, str(process_id())
    client.key_value_set(f"drpo_jax/hosts/{number}", socket.gethostname())
    show = sys.excepthook

    def show_and_leave(*error):
        show(*error)
        leave(1)

    sys.excepthook = show_and_leave


def process_count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes


def process_id() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id


def is_main() -> bool:
    """Whether this is process 0: the one that logs, and writes what only one should."""
    return process_id() == 0


def share(sequence):
    """This process's contiguous part of a sequence; the parts are as equal as can be, and make up the
    whole in the order of the processes."""
    n, count = len(sequence), process_count()
    return sequence[n * process_id() // count : n * (process_id() + 1) // count]


def gather(name: str, timeout_seconds: float = TIMEOUT, **arrays) -> list[dict[str, np.ndarray]]:
    """The arrays of all processes, on all of them; all have to call it, and none goes on before.

    For small things (megabytes at most): they go through process 0.

    Args:
      name: what this is about, for the error; the same on every process.
      timeout_seconds: how long to wait for the others.
      arrays: numbers, strings and NumPy arrays of them (no objects), of any shape.

    Returns:
      For every process, by its number, its arrays by name.

    Raises:
      MissingProcess: the others did not come, or this one came after they had given up.
    """
    if process_count() == 1:
        return [{key: np.asarray(value) for key, value in arrays.items()}]
    client, me, call = distributed.global_state.client, process_id(), _calls[name]
    _calls[name] += 1
    place = f"drpo_jax/gather/{name}/{call}"
    client.key_value_set_bytes(f"{place}/{me}", _to_bytes(arrays))
    milliseconds = int(1000 * timeout_seconds)
    try:
        client.wait_at_barrier(place, milliseconds)
        parts = [
            _from_bytes(client.blocking_key_value_get_bytes(f"{place}/{i}", milliseconds))
            for i in range(process_count())
        ]
    except jax.errors.JaxRuntimeError as error:
        raise MissingProcess(_who_is_missing(name, place, timeout_seconds)) from error
    if call:  # everybody has come to this call, so nobody still reads the one before
        client.key_value_delete(f"drpo_jax/gather/{name}/{call - 1}/{me}")
    return parts


def barrier(name: str, timeout_seconds: float = TIMEOUT) -> None:
    """Returns once all processes have called it. Arguments and errors are those of `gather`."""
    gather(name, timeout_seconds)


def on_main(name: str, function) -> None:
    """Calls `function` on process 0, which the others wait for; a ValueError is raised on all of them,
    for what is wrong on one is wrong for the run."""
    problem = ""
    if is_main():
        try:
            function()
        except ValueError as error:
            problem = str(error)
    if problem := gather(name, problem=problem)[0]["problem"].item():
        raise ValueError(problem)


def fetch(tree):
    """Device arrays, whole, as NumPy arrays on every process; all have to call it with the same ones."""
    if process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def leave(status: int) -> NoReturn:
    """Ends this process with the exit status `status`.

    One of several is ended at once. An ordinary exit would wait for minutes in jax for the others,
    which wait for this one, and then lose the status.
    """
    if process_count() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if status and is_main():  # without the coordinator the others could not print their own error
        time.sleep(LAST_WORDS)
    os._exit(status)


def _from_environment():
    """Arguments for `jax.distributed.initialize` from the environment: none for a process that is
    said to be alone; None where nothing is said."""
    given = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, NUMBER)}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(given):
        return None
    advice = (
        f"A run of several processes needs all of {ADDRESS} (host:port, where process 0 listens), "
        f"{COUNT} and {NUMBER} (from 0); `bash launch/multiprocess.sh` sets them on one machine"
    )
    if missing:
        present = " and ".join(name for name in given if name not in missing)
        raise ValueError(f"{present} set, but not {' and '.join(missing)}. {advice}")
    count, number = given[COUNT], given[NUMBER]
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"{NUMBER}={number} of {COUNT}={count}: there is no such process. {advice}"
        )
    if not given[ADDRESS].rpartition(":")[2].isdecimal():
        raise ValueError(f"{ADDRESS}={given[ADDRESS]}: there is no port. {advice}")
    if count == "1":
        return {}
    return dict(
        coordinator_address=given[ADDRESS],
        num_processes=int(count),
        process_id=int(number),
        cluster_detection_method="deactivate",
    )


def _from_tpu():
    """The same for one of several hosts of a TPU slice; none elsewhere."""
    for cluster in (GkeTpuCluster, GceTpuCluster):
        try:
            several = cluster.is_env_present() and cluster.get_process_count() > 1
        except OSError:  # a TPU without Google's metadata server (a notebook's, say): one host
            continue
        if several:
            return dict(cluster_detection_method=cluster.name)
    return {}


def _who_is_missing(name, place, timeout_seconds):
    client, me, count = distributed.global_state.client, process_id(), process_count()
    came = _numbers(client.key_value_dir_get_bytes(f"{place}/"))
    hosts = _numbers(client.key_value_dir_get("drpo_jax/hosts/"))
    absent = [f"{i} ({hosts.get(i, 'host unknown')})" for i in range(count) if i not in came]
    if not absent:
        return f"{name!r}: process {me} came when the others had given up waiting for it"
    who = f"process{'es' * (len(absent) > 1)} {', '.join(absent)} of {count}"
    return (
        f"{name!r}: {who} did not come within {timeout_seconds:.0f} seconds; look for an error or "
        f"what keeps it busy in its own output. (This is process {me}.)"
    )


def _numbers(entries):
    """Entries (…/NUMBER, value) of the key-value store → {number: value}"""
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _to_bytes(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _from_bytes(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
