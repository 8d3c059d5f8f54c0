"""Examples for supervised learning: from files of chats or pairs, or from the right responses of a run.

The modules:

    files      prompts with responses and chats, as text, from JSON lines and parquet
    rollouts   rejection sampling: the right responses among the saved rollouts of a run
    examples   token ids, the held-out part, and the order in which updates read them

Without either source, the warm start learns from the demonstrations of the task (`data.TASKS`).
"""

from drpo_jax.supervised.examples import Example, Examples, load, recorded_updates

__all__ = ["Example", "Examples", "load", "recorded_updates"]
