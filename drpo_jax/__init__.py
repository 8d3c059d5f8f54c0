"""DRPO (Divergence Regularized Policy Optimization) for language models, in JAX."""

__version__ = "0.2.0"
