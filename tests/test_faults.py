"""The short form of `benchmarks.faults`: after each fault, the end is that of the uninterrupted run."""

import pytest

from benchmarks import faults

pytestmark = pytest.mark.slow


def test_a_run_survives_faults(tmp_path):
    only = "SIGKILL at a random|verifier processes|bit flipped in the last|two starts"
    counts = faults.run(faults.Faults(tmp_path), 1, only)
    assert len(counts) == 4
    assert {outcome for outcomes in counts.values() for outcome in outcomes} == {faults.SAME}
