"""The short form of `benchmarks.faults`: after each fault, the end is that of the uninterrupted run."""

import os

import pytest

from benchmarks import faults

pytestmark = pytest.mark.slow


def test_a_run_survives_faults(tmp_path, monkeypatch):
    # One device, few optimizations, and what one start has compiled serves the next.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    only = "SIGKILL at a random|verifier processes"
    counts = faults.run(faults.Faults(tmp_path), 1, only)
    assert len(counts) == 2
    assert {outcome for outcomes in counts.values() for outcome in outcomes} == {faults.SAME}
