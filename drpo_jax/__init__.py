"""DRPO (Divergence Regularized Policy Optimization) for language models, in JAX."""
