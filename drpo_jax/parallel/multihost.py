"""Runs of several processes: `jax.distributed`, and the exchange of host data between processes.

Every process runs the same program, and its device arrays are global. Data that only one host knows
(rewards, errors, the contents of a file) is exchanged through the key-value store of jax's coordination
service, which runs in process 0. `gather` returns the arrays of all processes on all processes, and
`barrier` is a gather without arrays. Both time out with an error that names the missing processes. If a
process dies, jax notices within 100 seconds, ends the other processes and names the dead one.

Process ids are those that the processes were started with (JAX_PROCESS_ID, or the TPU worker number). On
a TPU `jax.process_index()` may number them differently.
"""

import collections
import io
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from drpo_jax.parallel import jax_internals

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = 600  # Seconds by which one host may lag behind another.
START_TIMEOUT = 300  # Seconds between the start of the first and of the last process.
COORDINATOR_LINGER = 2  # Seconds that process 0 stays alive after an error.

_calls: collections.Counter[str] = collections.Counter()  # calls of `gather` by name


class MissingProcess(RuntimeError):
    """Other processes did not arrive in time; the message names them."""


def initialize(timeout_seconds: float = START_TIMEOUT) -> None:
    """Connects this process to the other processes of its run. Call it before any JAX computation.

    jax detects the hosts of a TPU slice (TPU VMs, GKE) by itself. Elsewhere three environment
    variables describe the run: JAX_COORDINATOR_ADDRESS (host:port on which process 0 listens),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0). Without them the process runs alone and this
    function does nothing. CPU devices communicate through Gloo, jax's default.

    If processes are still missing after `timeout_seconds`, jax aborts the others with an error that
    lists the ids of the missing ones.

    Raises:
      ValueError: if only some of the variables are set, or if their values are invalid.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _from_environment()
    if arguments is None:
        cluster = jax_internals.tpu_cluster()
        arguments = {"cluster_detection_method": cluster} if cluster else {}
    if not arguments:
        return
    # The preemption service would only record SIGTERM, and a preempted process would continue to run.
    jax.config.update("jax_enable_preemption_service", False)
    seconds = int(timeout_seconds)
    jax_internals.initialize(seconds, initialization_timeout=seconds + 30, **arguments)
    hosts = f"drpo_jax/hosts/{process_id()}"
    jax_internals.client().key_value_set(hosts, socket.gethostname())
    show = sys.excepthook

    def show_and_leave(*error: Any) -> None:
        show(*error)
        leave(1)

    sys.excepthook = show_and_leave


def process_count() -> int:
    """Returns the number of processes of the run."""
    return jax_internals.process_count() if jax.distributed.is_initialized() else 1


def process_id() -> int:
    """Returns the id of this process, from 0."""
    return jax_internals.process_id() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Returns whether this is process 0, which writes logs and other files of the whole run."""
    return process_id() == 0


def share(sequence: Any) -> Any:
    """Returns this process's contiguous part of a sequence or array.

    The sizes of the parts differ by at most one. Concatenated in the order of the processes, the parts
    are the whole sequence.
    """
    n, count = len(sequence), process_count()
    return sequence[n * process_id() // count : n * (process_id() + 1) // count]


def gather(
    name: str, timeout_seconds: float = TIMEOUT, **arrays: Any
) -> list[dict[str, np.ndarray]]:
    """Returns the arrays of all processes on every process.

    Every process must call it; it returns once all of them have. The data passes through process 0, so
    keep it small (megabytes at most).

    Args:
      name: describes the exchange in errors; the same on every process.
      timeout_seconds: how long to wait for the other processes.
      **arrays: numbers, strings, or NumPy arrays of them, of any shape; no objects.

    Returns:
      One dictionary per process, in the order of their ids, from the names to the arrays.

    Raises:
      MissingProcess: if other processes did not arrive in time, or if this process arrived after the
        others had timed out.
    """
    if process_count() == 1:
        return [{key: np.asarray(value) for key, value in arrays.items()}]
    client, me, call = jax_internals.client(), process_id(), _calls[name]
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
    if call:  # All processes have reached this call, so none still reads the previous one.
        client.key_value_delete(f"drpo_jax/gather/{name}/{call - 1}/{me}")
    return parts


def barrier(name: str, timeout_seconds: float = TIMEOUT) -> None:
    """Returns once all processes have called it. Arguments and errors are those of `gather`."""
    gather(name, timeout_seconds)


def on_main(name: str, function: Callable[[], object]) -> None:
    """Calls `function` on process 0 while the other processes wait.

    A ValueError of `function` is raised on all processes, because input that is invalid on one process
    is invalid for the whole run.
    """
    problem = ""
    if is_main():
        try:
            function()
        except ValueError as error:
            problem = str(error)
    if problem := gather(name, problem=problem)[0]["problem"].item():
        raise ValueError(problem)


def fetch(tree: Any) -> Any:
    """Returns whole device arrays as NumPy arrays.

    All processes must call it with the same arrays.
    """
    if process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def leave(status: int) -> NoReturn:
    """Ends this process with the exit status `status`.

    In a run of several processes it ends immediately. An ordinary exit would wait in jax for minutes for
    the other processes, which in turn wait for this one, and would then lose the status.
    """
    if process_count() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if status and is_main():  # Without the coordinator the others could not print their own error.
        time.sleep(COORDINATOR_LINGER)
    os._exit(status)


def _from_environment() -> dict[str, Any] | None:
    """Returns arguments of `jax.distributed.initialize` from the environment.

    The result is empty for a run of one process and None if no variable is set.
    """
    values = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, NUMBER)}
    missing = [name for name, value in values.items() if not value]
    if len(missing) == len(values):
        return None
    advice = (
        f"A run of several processes needs all of {ADDRESS} (host:port on which process 0 listens), "
        f"{COUNT} and {NUMBER} (from 0); `bash launch/multiprocess.sh` sets them on one machine"
    )
    if missing:
        present = " and ".join(name for name in values if name not in missing)
        raise ValueError(f"{present} set, but not {' and '.join(missing)}. {advice}")
    count, number = values[COUNT], values[NUMBER]
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"{NUMBER}={number} of {COUNT}={count}: there is no such process. {advice}"
        )
    if not values[ADDRESS].rpartition(":")[2].isdecimal():
        raise ValueError(f"{ADDRESS}={values[ADDRESS]}: there is no port. {advice}")
    if count == "1":
        return {}
    return dict(
        coordinator_address=values[ADDRESS],
        num_processes=int(count),
        process_id=int(number),
        cluster_detection_method="deactivate",
    )


def _who_is_missing(name: str, place: str, timeout_seconds: float) -> str:
    """Returns the message of a `MissingProcess`; `place` is the barrier's key in the store."""
    client, me, count = jax_internals.client(), process_id(), process_count()
    arrived = _by_process(client.key_value_dir_get_bytes(f"{place}/"))
    hosts = _by_process(client.key_value_dir_get("drpo_jax/hosts/"))
    absent = [f"{i} ({hosts.get(i, 'host unknown')})" for i in range(count) if i not in arrived]
    if not absent:
        return f"{name!r}: process {me} arrived after the others had timed out"
    who = f"process{'es' * (len(absent) > 1)} {', '.join(absent)} of {count}"
    return (
        f"{name!r}: {who} did not arrive within {timeout_seconds:.0f} seconds; look in its output for "
        f"an error or for work that takes that long. (This is process {me}.)"
    )


def _by_process(entries: list[tuple[str, Any]]) -> dict[int, Any]:
    """Maps process ids to values, from entries (…/ID, value) of the key-value store."""
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _to_bytes(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _from_bytes(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
