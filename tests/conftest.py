"""The tests run on eight virtual CPU devices, so that every sharded path runs on any machine.

JAX reads these environment variables on its first import, which comes after this file.
"""

import ctypes
import gc
import os
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

COUNT = "--xla_force_host_platform_device_count"
if COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COUNT}=8".strip()
# Small CPU programs compile faster without the fusion emitters, and in one piece: other tests use the
# cores on which LLVM would compile further pieces.
for flag, value in (
    ("--xla_cpu_use_fusion_emitters", "false"),
    ("--xla_cpu_parallel_codegen_split_count", "1"),
):
    if version("jax").startswith("0.10.") and flag not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {flag}={value}"
# A collective blocks one of XLA's threads on each device, and a device may run several at a time. With
# the default of one thread per device, they can wait for each other for ever.
os.environ.setdefault("PJRT_NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.pop("INSTALL", None)  # The launch scripts under test install what they do by default.


MEMORY = 3 * 2**30  # bytes

# Imports and traces make millions of objects that stay, and Python's collector would scan them again and
# again. It starts after the imports, leaves their objects out, and runs less often than by default.
gc.disable()
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish() -> None:
    """Starts Python's garbage collector."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the files that have most slow tests, so that no worker ends long after the other."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Frees compiled programs after a module whose process has grown beyond `MEMORY`."""
    yield
    if resident_memory() > MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()
        if platform.libc_ver()[0] == "glibc":  # It keeps most of what is freed.
            ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Returns the resident memory of this process in bytes; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Turns off most of XLA's optimizations, for modules that spend their time compiling.

    Their checks must not depend on these optimizations.
    """
    import jax

    options = {"jax_disable_most_optimizations": (True, False)}
    options["jax_persistent_cache_min_compile_time_secs"] = (0.0, 0.5)
    for name, (value, _) in options.items():
        jax.config.update(name, value)
    yield
    for name, (_, before) in options.items():
        jax.config.update(name, before)
