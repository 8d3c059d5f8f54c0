"""Importance weights for the mismatch of the sampler, by hand."""

import numpy as np
import pytest

from drpo_jax.objectives import CORRECTIONS, LEVELS, mismatch_weight

# π_old / µ of the tokens, two responses and one token of none.
RATIO = np.array([[1.5, 4.0, 0.25, 0.5, 2.0, 3.0]])
MASK = np.array([[1, 1, 1, 2, 2, 0]])
SEQUENCE = [1.5, 1.5, 1.5, 1.0, 1.0, 0.0]  # the products
GEOMETRIC = [1.5 ** (1 / 3)] * 3 + [1.0, 1.0, 0.0]


def pad(x):
    """Pads to one shape with mask 0, so that all cases share a compilation."""
    return np.pad(x, [(0, 3 - x.shape[0]), (0, 9 - x.shape[1])])


def of_logprobs(name, old_logp, full_logp, mask, **keywords):
    arrays = pad(np.float32(old_logp)), pad(np.float32(full_logp)), pad(np.int32(mask))
    result = mismatch_weight(name, *arrays, **keywords)
    assert result.dtype == np.float32 and result.shape == (3, 9)
    assert not np.asarray(result)[arrays[2] == 0].any()
    return np.asarray(result)[: mask.shape[0], : mask.shape[1]]


def weight(name, ratio=RATIO, mask=MASK, **keywords):
    full_logp = np.log(np.linspace(0.05, 0.2, ratio.size)).reshape(ratio.shape)
    return of_logprobs(name, full_logp + np.log(ratio), full_logp, mask, **keywords)


@pytest.mark.parametrize(
    "name, level, keywords, expected",
    [
        ("tis", "token", {}, [1.5, 2.0, 0.25, 0.5, 2.0, 0]),  # cap 2
        ("tis", "token", {"cap": 3.0, "floor": 0.4}, [1.5, 3.0, 0.25, 0.5, 2.0, 0]),  # no floor
        ("mis", "token", {}, [1.5, 0, 0.25, 0.5, 2.0, 0]),
        ("mis", "token", {"cap": 5.0, "floor": 0.5}, [1.5, 4.0, 0, 0.5, 2.0, 0]),  # IcePop
        ("tis", "sequence", {"cap": 1.2}, [1.2, 1.2, 1.2, 1.0, 1.0, 0]),
        ("mis", "sequence", {"cap": 1.2}, [0, 0, 0, 1.0, 1.0, 0]),
        ("mis", "sequence", {}, SEQUENCE),
        ("tis", "geometric", {}, GEOMETRIC),
        ("tis", "geometric", {"cap": 1.1}, [1.1, 1.1, 1.1, 1.0, 1.0, 0]),
        ("mis", "geometric", {"cap": 1.1, "floor": 0.9}, [0, 0, 0, 1.0, 1.0, 0]),
        ("mis", "geometric", {"floor": 1.05}, [*GEOMETRIC[:3], 0, 0, 0]),
    ],
)
def test_by_hand(name, level, keywords, expected):
    result = weight(name, level=level, **keywords)
    np.testing.assert_allclose(result, [expected], rtol=1e-5)


def test_the_default_level_is_the_token():
    for name in CORRECTIONS:
        np.testing.assert_array_equal(weight(name), weight(name, level="token"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_packed_responses_weigh_what_they_weigh_in_rows_of_their_own(name, level):
    rng = np.random.default_rng(0)
    lengths, ratio = (5, 1, 3), np.exp(rng.normal(0, 0.5, (3, 5)))
    alone = np.arange(5) < np.array(lengths)[:, None]
    packed = np.concatenate([row[:n] for row, n in zip(ratio, lengths, strict=True)])[None]
    numbers = np.repeat([1, 2, 3], lengths)[None]
    bounds = {"cap": 1.3, "floor": 0.8}
    rows = weight(name, ratio, alone, level=level, **bounds)
    assert len(np.unique(rows)) > 2
    together = weight(name, packed, numbers, level=level, **bounds)
    np.testing.assert_allclose(together[0], np.asarray(rows)[alone], rtol=1e-5)


def test_the_token_level_is_unbiased_for_expectations_under_the_learner():
    """E_µ[ρ·f] = E_π_old[f], and E_µ[ρ] = 1."""
    mu, old = np.array([[0.5, 0.3, 0.2]]), np.array([[0.25, 0.35, 0.4]])
    rho = of_logprobs("tis", np.log(old), np.log(mu), np.ones((1, 3)), cap=10.0)
    np.testing.assert_allclose(mu * rho, old, rtol=1e-6)
    masked = of_logprobs("mis", np.log(old), np.log(mu), np.ones((1, 3)), cap=1.5)
    np.testing.assert_allclose(mu * masked, [[0.25, 0.35, 0]], rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_extreme_inputs_stay_finite(name, level):
    logp = np.array([[0.0, -1e-3, -80.0, -1e4, -np.inf, -np.inf, np.nan]])
    other = np.array([[-np.inf, -80.0, 0.0, -1e4, 0.0, -np.inf, np.nan]])
    mask = np.array([[1, 2, 3, 4, 5, 6, 0]])  # values outside of responses are ignored
    result = of_logprobs(name, logp, other, mask, level=level, cap=1e9)
    ends = np.exp([20.0, 20.0, -20.0, 0.0, -20.0, 0.0])
    np.testing.assert_allclose(result, [[*ends, 0]], rtol=1e-5)
    one = of_logprobs(name, logp, other, np.minimum(mask, 1), level=level)
    assert np.isfinite(one).all()


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match="Unknown correction 'tiss'. Did you mean 'tis'"):
        weight("tiss")
    with pytest.raises(ValueError, match="level 'sequences'. Did you mean 'sequence'"):
        weight("tis", level="sequences")
