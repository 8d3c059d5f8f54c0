"""The clock of idle devices: running programs are in flight, donated or failed ones are not."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from drpo_jax.parallel import DeviceClock


class Result:
    """The result of a program that runs until `ready` is set."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        self.ready.wait()


def idles(clock):
    """Whether the clock counts idle time, within a few seconds."""
    before, deadline = clock.idle_seconds(), time.monotonic() + 10
    while clock.idle_seconds() == before and time.monotonic() < deadline:
        time.sleep(0.001)
    return clock.idle_seconds() > before


def test_only_the_time_without_a_program_counts():
    clock = DeviceClock()
    assert idles(clock)
    start = clock.watch(lambda result: (jnp.zeros(3), result))
    results = Result(), Result()
    for result in results:
        start(result)
    before = clock.idle_seconds()
    time.sleep(0.02)
    results[0].ready.set()
    time.sleep(0.02)
    assert clock.idle_seconds() == before
    results[1].ready.set()
    assert idles(clock)


def test_programs_that_fail_are_traced_or_lose_their_result_end():
    clock = DeviceClock()
    double = clock.watch(jax.jit(lambda x: 2 * x, donate_argnums=0))
    assert float(double(double(double(jnp.float32(1))))) == 8  # The inner results are donated.
    assert idles(clock)
    assert jax.eval_shape(double, jnp.ones(3)).shape == (3,)
    assert idles(clock)
    with pytest.raises(TypeError):
        double("text")
    assert idles(clock)


def test_a_watched_function_has_the_attributes_of_the_function():
    watched = DeviceClock().watch(jax.jit(jnp.sin))
    assert watched.lower(jnp.ones(3)).compile() is not None
