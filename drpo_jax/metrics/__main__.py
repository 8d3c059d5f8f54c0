"""Prints the catalogue of metrics as Markdown: python -m drpo_jax.metrics"""

from drpo_jax.metrics.catalogue import markdown_table

if __name__ == "__main__":
    print(markdown_table())
