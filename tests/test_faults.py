"""The short form of `benchmarks.faults`: after each fault, the end is that of the uninterrupted run."""

import pytest

from benchmarks import faults

pytestmark = pytest.mark.slow


def test_a_run_survives_faults(tmp_path):
    only = "SIGKILL at a random|verifier processes"
    counts = faults.run(faults.Faults(tmp_path), 1, only)
    assert len(counts) == 2
    assert {outcome for outcomes in counts.values() for outcome in outcomes} == {faults.SAME}
