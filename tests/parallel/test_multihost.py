"""Runs of real processes on this machine, with four CPU devices each."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

from drpo_jax.parallel import multihost

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOST = re.escape(socket.gethostname())

# The beginning of every process's program.
START = """
import sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from drpo_jax.parallel import multihost
multihost.initialize()
me = multihost.process_id()
"""


def start(program, environments):
    """Runs `program` in one process per environment.

    Returns:
      A list of (exit status, output), and a dictionary from process number to end time in seconds.
    """
    common = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "MEGASCALE_")) and name != "XLA_FLAGS"
    } | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=common | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    ended, deadline = {}, time.monotonic() + 60
    try:
        while len(ended) < len(processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            for number, process in enumerate(processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic()
    finally:
        for process in processes:
            process.kill()
    return [(p.communicate()[0], p.returncode)[::-1] for p in processes], ended


def numbered(count):
    """Returns the environments of `count` processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [
        {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        for number in range(count)
    ]


def test_two_processes_form_one_run_and_name_missing_processes():
    program = (
        START
        + """
assert (multihost.process_count(), multihost.is_main()) == (2, me == 0)
assert (jax.local_device_count(), jax.device_count()) == (4, 8)
mesh = jax.make_mesh((8,), ("d",))
rows = jax.NamedSharding(mesh, P("d"))
whole = np.arange(16.0)
x = jax.make_array_from_process_local_data(rows, multihost.share(whole))
psum = jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"), out_specs=P())
assert jax.jit(psum)(x).tolist() == [whole[::2].sum(), whole[1::2].sum()]

for call in range(3):
    parts = multihost.gather("parts", value=multihost.share(np.arange(5)) + call, text=f"a {me} ü")
    assert [p["value"].tolist() for p in parts] == [[call, call + 1], [call + 2, call + 3, call + 4]]
    assert [p["text"].item() for p in parts] == ["a 0 ü", "a 1 ü"]
assert (multihost.fetch({"x": x})["x"] == whole).all()

def wrong():
    raise ValueError("wrong on process 0")

done = []
multihost.on_main("right", lambda: done.append(1))
assert done == [1] * (me == 0)
try:
    multihost.on_main("wrong", wrong)
except ValueError as error:
    assert str(error) == "wrong on process 0"
else:
    raise AssertionError
large = multihost.gather("large", value=np.full(2**20, me, np.float32))  # 4 MB
assert all((part["value"] == i).all() for i, part in enumerate(large))
multihost.barrier("all here", 10)
client = multihost.jax_internals.client()
names = ("parts/2", "right/0", "wrong/0", "large/0", "all here/0")
kept = {key.rsplit("/", 1)[0] for key, _ in client.key_value_dir_get_bytes("drpo_jax/gather/")}
assert kept == {f"drpo_jax/gather/{n}" for n in names}, kept

started = time.monotonic()
time.sleep(2.5 * me)
try:
    multihost.barrier("one is late", 1)
except multihost.MissingProcess as error:
    print(error)
assert me or time.monotonic() - started < 2
time.sleep(2 - 2 * me)
if me == 1:
    raise KeyError("a defect")  # exits immediately although process 0 is still running
time.sleep(3)
multihost.leave(3)
"""
    )
    ((status_0, output_0), (status_1, output_1)), ended = start(program, numbered(2))
    assert (status_0, status_1) == (3, 1), output_0 + output_1
    assert ended[1] < ended[0] - 2  # process 1 did not wait for process 0
    missing = (
        rf"'one is late': process 1 \({HOST}\) of 2 did not arrive within 1 seconds; .*\(This is"
    )
    assert re.search(missing + r" process 0\.\)", output_0), output_0
    assert "'one is late': process 1 arrived after the others had timed out" in output_1
    assert "KeyError: 'a defect'" in output_1


def test_start_names_missing_processes():
    program = START.replace("initialize()", "initialize(3)")
    for status, output in start(program, numbered(3)[:2])[0]:
        assert status < 0  # jax aborts the process
        assert re.search(
            r"reached the barrier: 2/3.*timed out task names:\s+2\b", output, re.DOTALL
        )


def test_hosts_of_a_tpu_slice_find_each_other():
    """The environment is that of a GKE slice; the devices are CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = START.replace(
        "multihost.initialize()",
        "from jax._src.clusters import cloud_tpu_cluster\n"
        "cloud_tpu_cluster.running_in_cloud_tpu_vm = True\n"
        "multihost.initialize()",
    )
    program += "print(multihost.gather('n', n=me)[1 - me]['n'], jax.device_count())"
    environments = [
        {
            "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1",
            "TPU_WORKER_ID": str(i),
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
            "JAX_COORDINATOR_PORT": port,
        }
        for i in range(2)
    ]
    assert [(s, o.split()) for s, o in start(program, environments)[0]] == [
        (0, ["1", "8"]),
        (0, ["0", "8"]),
    ]


ENVIRONMENT = {
    "JAX_COORDINATOR_ADDRESS": "host:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID. A run of",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"},
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID",
        ),
        (
            ENVIRONMENT | {"JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2: there is no",
        ),
        (ENVIRONMENT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: there is no such"),
        (ENVIRONMENT | {"JAX_COORDINATOR_ADDRESS": "host"}, "ADDRESS=host: there is no port"),
    ],
    ids=str,
)
def test_invalid_environment_raises(monkeypatch, environment, message):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        multihost.initialize()


def test_a_single_process_needs_no_coordinator(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    multihost.initialize()
    monkeypatch.setattr(GkeTpuCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(GkeTpuCluster, "get_process_count", lambda: 2)
    assert multihost.jax_internals.tpu_cluster() == "gketpu"
    for name, value in (ENVIRONMENT | {"JAX_NUM_PROCESSES": "1"}).items():
        monkeypatch.setenv(name, value)  # takes precedence over the TPU
    multihost.initialize()
    assert multihost.is_main() and multihost.process_count() == 1
    multihost.barrier("alone")
    (part,) = multihost.gather("alone", value=[1.0, 2.0], text="t")
    assert part["value"].tolist() == [1.0, 2.0] and part["text"] == "t"
    assert multihost.share([1, 2, 3]) == [1, 2, 3]
    assert multihost.fetch({"x": jax.numpy.arange(3)})["x"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="so it is"):
        multihost.on_main("alone", lambda: int("so it is"))
    with pytest.raises(SystemExit, match="3"):
        multihost.leave(3)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_even_and_add_up_to_the_whole(monkeypatch, count):
    monkeypatch.setattr(multihost, "process_count", lambda: count)
    for length in (0, 1, 7, 24):
        parts = []
        for number in range(count):
            monkeypatch.setattr(multihost, "process_id", lambda number=number: number)
            parts.append(multihost.share(np.arange(length)))
        assert np.concatenate(parts).tolist() == list(range(length))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
