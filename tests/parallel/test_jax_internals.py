"""Checks that the installed jax still has the private names that `jax_internals` uses."""

import importlib

import jax
import pytest

from drpo_jax.parallel import jax_internals
from drpo_jax.parallel.jax_internals import ADVICE, CHECKED, missing_names


def test_this_jax_has_been_checked():
    minor = ".".join(map(str, jax.__version_info__[:2]))
    assert minor in CHECKED, (
        f"drpo_jax/parallel/jax_internals.py has not been checked with jax {jax.__version__}. If all "
        f"other tests in tests/parallel pass, add {minor!r} to CHECKED in that file. If not: {ADVICE}"
    )
    assert not missing_names(), ADVICE


def test_the_service_still_takes_a_registration_timeout():
    """`jax_internals.initialize` passes it through a private function whose signature may change."""
    library = importlib.import_module("jax._src.distributed")._jax
    signature = library.get_distributed_runtime_service.__doc__
    assert "cluster_register_timeout" in signature, (
        f"jax's coordination service takes other arguments now: {signature}. {ADVICE}"
    )


def test_a_moved_name_is_reported_with_advice(monkeypatch):
    names = {"jax._src.distributed": {"global_state.clients": "client"}, "jax._src.no": {"x": "y"}}
    monkeypatch.setattr(jax_internals, "NAMES", names)
    jax_internals._private.cache_clear()
    missing = "jax._src.distributed.global_state.clients .for client., jax._src.no.x .for y."
    with pytest.raises(ImportError, match=f"missing: {missing}. jax .* has moved private API"):
        jax_internals.tpu_cluster()
    jax_internals._private.cache_clear()
