"""Benchmarks and checks behind the figures in the documentation: python -m benchmarks.NAME."""
