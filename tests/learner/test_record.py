import numpy as np
import pytest

from drpo_jax.learner.record import load_rollout, rollout_path, save_rollout


def arrays():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(64, size=(4, 9)).astype(np.int32),
        "response_mask": rng.uniform(size=(4, 5)) < 0.5,
        "logp": rng.normal(size=(4, 5)).astype(np.float32),
        "prompt": np.array(["1+1=", "2*3=", "", "7-9= −"]),
        "response": np.array(["2", "", "∑ 🙂\0", "x" * 1000], dtype=object),
    }


def test_a_rollout_comes_back_as_it_was_saved(tmp_path):
    path = save_rollout(tmp_path, 20, **arrays())
    assert path == rollout_path(tmp_path, 20) == tmp_path / "rollouts" / "step_000020.npz"
    loaded = load_rollout(path)
    np.testing.assert_array_equal(loaded.pop("loss_mask"), loaded["response_mask"])  # an older file
    assert loaded.pop("step") == 20 and set(loaded) == set(arrays())
    for name, expected in arrays().items():
        assert loaded[name].dtype == expected.dtype
        np.testing.assert_array_equal(loaded[name], expected)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = save_rollout(tmp_path, 3, **arrays())
    before = path.read_bytes()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError):
        save_rollout(tmp_path, 3, **arrays())
    assert path.read_bytes() == before
