"""How the C library's allocator treats the memory that programs on a CPU free."""

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

# Parameters of glibc: variable of the environment → number in mallopt (malloc.h), value.
_PARAMETERS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # bytes; the largest int
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),  # bytes
    "MALLOC_ARENA_MAX": (-8, 1),
}
# JAX's event at the end of a compilation.
COMPILATION = "/jax/core/compile/backend_compile_duration"
_LONG = 0.2  # Seconds; shorter compilations leave little behind.
# What drivers create in /dev for NVIDIA GPUs, AMD GPUs and TPUs.
_ACCELERATORS = "nvidia0", "kfd", "accel0", "vfio/0"


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next allocation, if this machine computes on CPUs.

    XLA allocates the temporaries of a CPU program at each call and frees them at its end. By default,
    glibc returns such blocks to the kernel, which maps and zeroes their pages again at the next call.
    In small updates this takes up to a third of the CPU time.

    Only the first arena holds blocks above 64 MiB, hence a single one. A thread keeps the arena that it
    has, and NumPy starts threads on its import, so the call comes before that.

    With an accelerator or another C library, nothing changes. A variable of the environment
    (MALLOC_ARENA_MAX, …) takes precedence.
    """
    if not keeping_pays():
        return
    mallopt = ctypes.CDLL(None).mallopt
    for variable, (number, value) in _PARAMETERS.items():
        if variable not in os.environ:
            mallopt(number, value)


def return_compilation_memory() -> None:
    """Makes malloc return what compilations have freed to the system, if this machine computes on CPUs.

    XLA's compiler leaves hundreds of MB behind, in pieces that its programs do not fill. The memory that
    programs have freed is returned as well, and the next call maps it again.
    """
    if not keeping_pays():
        return
    import jax  # After `keep_freed_memory`, because JAX imports NumPy.

    trim = ctypes.CDLL(None).malloc_trim

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILATION and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)


def environment() -> Mapping[str, str]:
    """Returns variables with which a child process behaves as after `keep_freed_memory`.

    Those that this process's environment has are left out, so that the user's values reach the child.
    """
    if not keeping_pays():
        return {}
    parameters = {name: str(value) for name, (_, value) in _PARAMETERS.items()}
    return {name: value for name, value in parameters.items() if name not in os.environ}


def keeping_pays(devices: Path = Path("/dev")) -> bool:
    """Returns whether the C library is glibc and JAX will choose the CPU; initializes no backend."""
    if platform.libc_ver()[0] != "glibc":
        return False
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any((devices / name).exists() for name in _ACCELERATORS)
