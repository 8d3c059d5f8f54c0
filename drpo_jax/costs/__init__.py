"""What programs cost on chips that one does not have.

chips    the chips, their numbers, and how to compile for them
hlo      the text of a compiled program, taken apart
counts   what it does: collectives, matmuls, memory traffic
flops    what the model's equations need
program  a program of a run, compiled and counted
table    for people, and for tools
"""

from drpo_jax.costs.chips import CHIPS, Chip, get_devices
from drpo_jax.costs.flops import (
    Work,
    decoding,
    generating,
    head_flops,
    layers_flops,
    reading,
    scoring,
    training,
)
from drpo_jax.costs.program import Cost, Program, device_bytes, measure
from drpo_jax.costs.table import amount, figures, memory_table, transfer_table, work_table

__all__ = [
    "CHIPS",
    "Chip",
    "Cost",
    "Program",
    "Work",
    "amount",
    "decoding",
    "device_bytes",
    "figures",
    "generating",
    "get_devices",
    "head_flops",
    "layers_flops",
    "measure",
    "memory_table",
    "reading",
    "scoring",
    "training",
    "transfer_table",
    "work_table",
]
