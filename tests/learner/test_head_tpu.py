"""The collectives of the sharded head, in the compiled program.

The loop over chunks contains sums of [chunk] and [chunk, D] arrays over `tensor`. Outside of the loop
the weight is gathered over `fsdp` once, its gradient is reduced into the shards once, and the loss is
summed.

The TPU compiler needs libtpu, but no TPU. The program for 8 CPU devices is checked in any case. Run as a
script, this file prints the program for TPU.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.learner import head_loss, policy
from drpo_jax.objectives import policy_objective
from drpo_jax.parallel import BATCH_AXES, make_mesh

FSDP, TENSOR = 4, 2
N, D, V, CHUNK = 1024, 128, 2048, 32  # 256 tokens and half the vocabulary per device
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiles only, takes no TPU
}


def fused(hidden, weight, targets, token_weight, inputs):
    return head_loss(
        hidden, weight, targets, token_weight, inputs, objective=policy("drpo"), chunk=CHUNK
    )[0]


def scanned(hidden, weight, targets, token_weight, inputs):
    """The same loss by a checkpointed scan, with collectives chosen by the compiler."""

    @jax.checkpoint
    def body(loss, piece):
        h, target, token_weight, inputs = piece
        logits = jnp.dot(h, weight.astype(h.dtype), preferred_element_type=jnp.float32)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]
        return loss - jnp.sum(token_weight * policy_objective("drpo", logp, **inputs)), None

    pieces = jax.tree.map(
        lambda a: a.reshape(-1, FSDP * CHUNK, *a.shape[1:]), (hidden, targets, token_weight, inputs)
    )
    return jax.lax.scan(body, jnp.zeros(()), pieces)[0]


def program(loss, devices):
    """The compiled text of `loss` and its gradients for hidden and weight."""
    mesh = make_mesh(data=1, fsdp=FSDP, expert=1, tensor=TENSOR, devices=list(devices))

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    floats = array((N,), jnp.float32, BATCH_AXES)
    arrays = (
        array((N, D), jnp.bfloat16, BATCH_AXES, None),
        array((D, V), jnp.float32, "fsdp", "tensor"),
        array((N,), jnp.int32, BATCH_AXES),
        floats,
        {"behavior_logp": floats, "advantage": floats},
    )
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return gradients.lower(*arrays).compile().as_text()


def collectives(text):
    """[(operation, [(dtype, shape) of its results])] inside and outside of the loops of a program."""
    bodies, current = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            current = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            bodies[current] = []
        elif current:
            bodies[current].append(line)

    def reached(names):
        """`names` and the computations that they call."""
        called = {
            name
            for caller in names
            for line in bodies[caller]
            for name in re.findall(r"%?([\w.\-]+)", " ".join(re.findall(r"=(%\S+|{%[^}]*})", line)))
            if name in bodies
        }
        return names if called <= names else reached(names | called)

    loops = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
    inside = reached(loops)
    operation = re.compile(
        r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
    )
    operations = ([], [])
    for name, lines in bodies.items():
        for result, kind in (m.groups() for line in lines if (m := operation.search(line))):
            shapes = [
                (dtype, tuple(int(n) for n in shape.split(",") if n))
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
            ]
            operations[name not in inside].append((kind, shapes))
    assert loops
    return operations


def check(text):
    """Checks the collectives. Returns: the dtypes in which the weight is gathered."""
    inside, outside = collectives(text)
    assert inside
    for kind, shapes in inside:
        assert kind == "all-reduce", (kind, shapes)
        assert all(shape in {(CHUNK,), (CHUNK, D)} for _, shape in shapes), (kind, shapes)
    kinds = [kind for kind, _ in outside]
    assert kinds.count("all-gather") == kinds.count("reduce-scatter") == 1
    for kind, shapes in outside:
        largest = max(math.prod(shape) for _, shape in shapes)
        if kind == "all-gather":  # an asynchronous one lists its operand as well
            assert largest == D * V // TENSOR
            gathered = {dtype for dtype, _ in shapes}
        elif kind == "reduce-scatter":
            assert ("f32", (D // FSDP, V // TENSOR)) in shapes
        else:  # the loss; the shards of the gradient over data and expert, whose sizes are 1
            assert kind == "all-reduce" and largest <= D * V // FSDP // TENSOR
    return gathered


def test_the_loop_sends_only_chunks():
    check(program(fused, jax.devices()))


def test_the_check_fails_for_collectives_that_the_compiler_chooses():
    with pytest.raises(AssertionError):
        check(program(scanned, jax.devices()))


def test_on_tpu_too():
    """On TPU the weight is gathered in bfloat16."""
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        needs = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
        pytest.skip(f"needs the TPU compiler: pip install --no-deps '{needs[0].split(';')[0]}'")
    env = os.environ | TPU | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert check(result.stdout) == {"bf16"}


if __name__ == "__main__":
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    print(program(fused, devices))
