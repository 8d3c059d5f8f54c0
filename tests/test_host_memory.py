"""Memory that a program has freed serves the next one without page faults."""

import os
import platform
import subprocess
import sys

import pytest

from drpo_jax import host_memory

SCRIPT = """
import resource, sys
if sys.argv[1:]:
    from drpo_jax.host_memory import keep_freed_memory
    keep_freed_memory()
import threading
import numpy as np

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = []
def work():
    page_faults()
    faults.append(page_faults())

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is set")


def page_faults(*arguments, **variables):
    """Page faults of the second of two equal allocations, in a thread of a new process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True,
        env=clean | {"JAX_PLATFORMS": "cpu"} | variables,
    )  # fmt: skip
    return int(done.stdout)


@GLIBC
def test_freed_memory_serves_the_next_allocation(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    default = page_faults()
    assert default >= 64  # One for each 2 MiB with huge pages, for each 4 KiB without.
    assert page_faults("keep") < default / 4
    assert page_faults(**host_memory.environment()) < default / 4


@GLIBC
def test_the_environment_takes_precedence(monkeypatch):
    assert page_faults("keep", MALLOC_MMAP_THRESHOLD_="65536") >= 64
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert "MALLOC_ARENA_MAX" in (variables := host_memory.environment())
    assert "MALLOC_MMAP_THRESHOLD_" not in variables


TRIM = """
import jax
from drpo_jax import host_memory
pages = lambda: int(open("/proc/self/statm").read().split()[1])
host_memory.return_compilation_memory()
blocks = [bytearray(4096) for _ in range(2**15)]  # 128 MiB
kept = bytearray(4096)  # Without trimming, the heap ends here.
full = pages()
del blocks
freed = pages()
jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", SECONDS)
print(int(freed - pages() > (full - pages()) / 2 > 2**13))
"""


@GLIBC
@pytest.mark.parametrize("seconds, trimmed", [("1.0", "1"), ("0.01", "0")])
def test_a_long_compilation_returns_its_memory(seconds, trimmed):
    keep = {name: str(value) for name, (_, value) in host_memory._PARAMETERS.items()}
    done = subprocess.run(
        [sys.executable, "-c", TRIM.replace("SECONDS", seconds)], capture_output=True, text=True,
        env=os.environ | keep | {"JAX_PLATFORMS": "cpu"}, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == trimmed


@GLIBC
@pytest.mark.parametrize("platforms, pays", [("cpu", True), ("cpu,cuda", True), ("tpu", False)])
def test_it_pays_where_jax_chooses_the_cpu(platforms, pays, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert host_memory.keeping_pays() is pays
    assert bool(host_memory.environment()) is pays


@GLIBC
@pytest.mark.parametrize("device", ["nvidia0", "kfd", "accel0", "vfio/0"])
def test_it_does_not_pay_beside_an_accelerator(device, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert host_memory.keeping_pays(tmp_path)
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert not host_memory.keeping_pays(tmp_path)
