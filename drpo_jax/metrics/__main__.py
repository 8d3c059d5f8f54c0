"""Prints the catalogue of metrics as Markdown: python -m drpo_jax.metrics"""

import signal

from drpo_jax.metrics.catalogue import markdown_table

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the output without a traceback.
    print(markdown_table())
