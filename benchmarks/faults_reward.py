"""The reward of `benchmarks.faults`, in a module that worker processes can import without JAX."""


def reward(prompt: str, response: str, answer: str) -> float:
    """1.0 for a right response and for one of odd length, else 0.0."""
    return float(len(response) % 2 or response == f"#{answer}")
