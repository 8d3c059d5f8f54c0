"""Tests run on eight CPU devices, so that every sharded path runs on any machine.

JAX reads these variables when it is first imported, which is after this file.
"""

import os
from pathlib import Path

COUNT = "--xla_force_host_platform_device_count"
if COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COUNT}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
