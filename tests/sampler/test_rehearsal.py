"""Rehearsals of the sampler: closed forms, and the device calls of the real sampler."""

import jax
import numpy as np
import pytest

from drpo_jax.models import ModelConfig, Transformer
from drpo_jax.sampler import Sampler, SamplingParams
from drpo_jax.sampler.rehearsal import rehearse

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_size=16
)
SLOTS, STEPS, PROMPT, LONGEST, SAMPLES = 6, 4, 8, 30, 3


class Shell:
    """A model of which only the config is known."""

    config = CONFIG


def new_sampler(model=None, slots=SLOTS, decode_steps=STEPS):
    return Sampler(
        model, slots=slots, decode_steps=decode_steps, prompt_length=PROMPT, prefill_chunk=4
    )


def rehearsed(responses, prompts=None, **sizes):
    """The rehearsal of responses [P, G] to prompts of PROMPT tokens."""
    responses = np.asarray(responses)
    params = SamplingParams(max_tokens=LONGEST, samples=responses.shape[1])
    prompts = np.full(len(responses), PROMPT) if prompts is None else prompts
    return rehearse(new_sampler(**sizes), Shell, params, prompts, responses)


def test_equal_responses_decode_in_waves():
    """Prefill samples the first token; each wave of slots then decodes the others."""
    n, waves = 13, 4
    schedule = rehearsed(np.full((SLOTS * waves // SAMPLES, SAMPLES), n))
    assert schedule.steps.tolist() == [STEPS] * (waves * (n - 1) // STEPS)
    assert np.all(schedule.live == schedule.steps * SLOTS)
    assert schedule.statistics["prompt_tokens"] == PROMPT * SLOTS * waves // SAMPLES
    assert schedule.statistics["response_tokens"] == n * SLOTS * waves
    assert schedule.calls["prefill"] == waves * PROMPT // 4
    assert schedule.calls["first_tokens"] == schedule.calls["admit"] == waves


def test_a_straggler_decodes_alone():
    """Five responses end after one decode step, the sixth after LONGEST − 1."""
    schedule = rehearsed([[2, 2, 2], [2, 2, LONGEST]])
    assert schedule.steps.sum() == LONGEST - 1
    assert schedule.live.sum() == 5 + LONGEST - 1
    # The rings grow with the only sequence that is left.
    assert np.all(np.diff(schedule.columns) >= 0)
    assert schedule.columns[0] < schedule.columns[-1] <= PROMPT + LONGEST


def test_a_freed_slot_is_filled_at_once():
    """While requests wait, a device call ends at the first step that frees an eighth of the slots."""
    schedule = rehearsed([[3, 20, 20], [20, 20, 20], [20, 20, 20]])
    assert schedule.steps[0] == 2  # The first token came from prefill.
    # Until the end, all slots are live.
    assert np.all((schedule.live == SLOTS * schedule.steps)[:-6])


def test_responses_of_one_token_need_no_decode_step():
    schedule = rehearsed(np.ones((4, SAMPLES), int))
    assert schedule.steps.size == 0 and "decode" not in schedule.calls
    assert schedule.statistics["response_tokens"] == 4 * SAMPLES


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_impossible_lengths(length):
    with pytest.raises(ValueError, match=f"{length} tokens do not fit .* has 1 to {LONGEST}"):
        rehearsed([[length] * SAMPLES])


def test_the_sampler_is_not_changed():
    sampler = new_sampler()
    programs = dict(sampler.programs)
    params = SamplingParams(max_tokens=LONGEST, samples=2)
    rehearse(sampler, Shell, params, np.array([3]), np.array([[5, 7]]))
    assert sampler.model is None and sampler.programs == programs
    assert not any(sampler.read_statistics().values())


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_the_calls_are_those_of_the_sampler():
    """Lengths that the sampler has drawn give its steps, its live slots and its rings."""
    model = Transformer(CONFIG, jax.random.key(0))
    sampler = new_sampler(model)
    decode, columns = sampler.programs["decode"], []

    def recorded(model, device, *args, **static):
        columns.append(device.columns())
        return decode(model, device, *args, **static)

    sampler.programs["decode"] = recorded
    prompts = [list(range(1, 2 + i % PROMPT)) for i in range(14)]
    params = SamplingParams(max_tokens=LONGEST, samples=SAMPLES, stop=(7,))
    rollouts = sampler.generate(prompts, params, jax.random.key(2))
    lengths = rollouts.response_lengths.reshape(-1, SAMPLES)
    assert lengths.min() == 1 and lengths.max() == LONGEST

    schedule = rehearsed(lengths, np.array([len(p) for p in prompts]))
    assert schedule.statistics == sampler.read_statistics()
    assert schedule.columns.tolist() == columns and len(set(columns)) > 2
