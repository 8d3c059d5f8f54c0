"""Memory, FLOPs and traffic of compiled programs, for accelerators that need not be present.

The modules:

    chips    accelerators, their peak rates, and how to compile for them
    hlo      parser for the text of a compiled program
    counts   collectives, matmul FLOPs and memory traffic of that text
    flops    FLOPs by the equations of the model
    limits   lower bounds on the times of decoding and updates, from the model's equations
    program  one program of a run, compiled and counted
    table    the results as tables and as JSON
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
from drpo_jax.costs.limits import DecodeBytes, compute_seconds, decode_bytes, decode_seconds
from drpo_jax.costs.program import Cost, Program, device_bytes, measure
from drpo_jax.costs.table import (
    amount,
    figures,
    grid,
    memory_table,
    transfer_table,
    work_table,
)

__all__ = [
    "CHIPS",
    "Chip",
    "Cost",
    "DecodeBytes",
    "Program",
    "Work",
    "amount",
    "compute_seconds",
    "decode_bytes",
    "decode_seconds",
    "decoding",
    "device_bytes",
    "figures",
    "generating",
    "get_devices",
    "grid",
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
