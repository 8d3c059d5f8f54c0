"""Examples for supervised learning: from files of chats or pairs, or from correct responses of a run.

The modules:

    files      prompts with responses and chats, as text, from JSON Lines and Parquet
    rollouts   rejection sampling: the correct responses in the saved rollouts of a run
    examples   token ids, the held-out examples, and the order in which updates use them

Without either source, supervised learning uses the demonstrations of the task (`data.TASKS`).
"""

from drpo_jax.supervised.examples import Example, Examples, load, recorded_updates

__all__ = ["Example", "Examples", "load", "recorded_updates"]
