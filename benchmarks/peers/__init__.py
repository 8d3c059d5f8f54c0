"""This project beside what a user would pick instead; see `benchmarks.peers.__main__`."""
