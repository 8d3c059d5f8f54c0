"""Prints the catalogue of metrics as Markdown: python -m drpo_jax.metrics"""

from drpo_jax.metrics.catalogue import markdown_table
from drpo_jax.output import print_page

if __name__ == "__main__":
    print_page(markdown_table())
