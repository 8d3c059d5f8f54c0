"""Counts in compiled programs: known transfers and matmuls, in loops of known trip count."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.costs.counts import collectives, matmul_flops, memory_traffic, out_of_memory
from drpo_jax.costs.hlo import Module

N, TRIPS = 4, 5
F32 = jnp.float32


def struct(*shape, dtype=F32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def sent(text, trips=1):
    return {(c.kind, c.sent, c.times, c.certain) for c in collectives(Module(text, trips))}


def on_mesh(local, *shape):
    """The compiled text of a function that runs on N devices, each with an array of this shape."""
    mesh = jax.make_mesh(
        (N, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()
    )
    spec = P("a", *[None] * (len(shape) - 1))
    whole = struct(N * shape[0], *shape[1:], sharding=NamedSharding(mesh, spec))
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return compiled(run, whole).as_text()


def scanned(step):
    """TRIPS times x ← step(x), with a sine in between so that XLA merges no two steps."""
    return lambda x: jax.lax.scan(lambda x, _: (jnp.sin(step(x)), None), x, length=TRIPS)[0]


def part(x):
    return jax.lax.dynamic_slice_in_dim(x, 0, x.shape[0] // N)


@pytest.mark.parametrize(
    ("kind", "share", "step"),
    [
        ("all-reduce", 2 * (N - 1) / N, lambda x: jax.lax.psum(x, "a")),
        ("all-gather", N - 1, lambda x: part(jnp.sin(jax.lax.all_gather(x, "a", tiled=True)))),
        (
            "reduce-scatter",
            (N - 1) / N,
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "a", tiled=True), (N, 1)),
        ),
        ("all-to-all", (N - 1) / N, lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True)),
        (
            "collective-permute",
            1,
            lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % N) for i in range(N)]),
        ),
    ],
)
def test_known_transfers_in_a_scan(kind, share, step):
    text = on_mesh(scanned(step), 8, 16)
    assert sent(text) == {(kind, share * 8 * 16 * 4, TRIPS, True)}


def test_nested_loops_and_loops_of_unknown_trip_count():
    def local(x):
        def until(x):
            return jax.lax.while_loop(
                lambda x: jnp.sum(x) < 10, lambda x: jax.lax.pmax(jnp.exp(x), "a"), x
            )

        inner = scanned(lambda x: jax.lax.psum(x, "a"))
        outer = jax.lax.fori_loop(0, 3, lambda _, x: jnp.cos(inner(x)), x)
        return jax.lax.fori_loop(0, 7, lambda _, x: until(jnp.cos(x)), outer)

    one = 2 * (N - 1) / N * 8 * 4
    text = on_mesh(local, 8)
    kind = "all-reduce"
    assert sent(text) == {(kind, one, 3 * TRIPS, True), (kind, one, 7, False)}
    assert sent(text, trips=6) == {(kind, one, 3 * TRIPS, True), (kind, one, 42, False)}


TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (state: (s32[], bf16[16,128], s32[])) -> (s32[], bf16[16,128], s32[]) {
  %state = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = s32[]{:T(128)} copy(%i)
  %two = s32[]{:T(128)} get-tuple-element(%state), index=2
  %next = s32[]{:T(128)} add(%copy.1, %two)
  %a = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %start = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) all-gather-start(%a), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="jit(f)/while/body/all_gather" stack_frame_id=3}
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %kernel = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%done), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"(("
}}, backend_config={"flag_configs":[]}
  ROOT %out = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%next, %kernel, %two)
}

%condition (state.1: (s32[], bf16[16,128], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %eight = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
}

ENTRY %main (x.1: bf16[16,128]) -> f32[16] {
  %x.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %copy.2 = s32[]{:T(128)} copy(%one)
  %by = s32[]{:T(128)} constant(2)
  %load = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %loaded = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%load)
  %tuple = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%copy.2, %loaded, %by)
  %while = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  %rows = f32[16]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %reduced = f32[16]{0:T(128)} all-reduce(%rows), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""  # noqa: E501


def test_the_text_of_a_tpu_program():
    """A counter from 1 to 8 by twos, both in the loop's state. Asynchronous operations count once."""
    gather, reduce = 3 * 16 * 128 * 2, 2 * 3 / 4 * 16 * 4
    assert sent(TPU) == {("all-gather", gather, 4, True), ("all-reduce", reduce, 1, True)}
    (source,) = {c.source for c in collectives(Module(TPU)) if c.times == 4}
    assert source == "jit(f)/while/body/all_gather"
    # Traffic outside of the core's own memory, S(1): x is read; the sum is read and written; the
    # gathered array is written and read. Scalars add a little.
    expected = 16 * 128 * 2 + 2 * 16 * 4 + 4 * 2 * 64 * 128 * 2
    assert memory_traffic(Module(TPU)) == pytest.approx(expected, abs=200)


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        (("f32[9,7]", "bf16[9,5]", "bf16[5,7]"), "dim_labels=bf_io->bf", 2 * 9 * 5 * 7),
        (("f32[5,7]", "bf16[9,5]", "bf16[9,7]"), "dim_labels=fb_io->bf", 2 * 9 * 5 * 7),
        (
            ("bf16[4,5,7]", "bf16[4,9,5]", "bf16[4,9,7]"),
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf",
            2 * 4 * 9 * 5 * 7,
        ),
        (
            ("f32[5,2,7]", "bf16[9,5,1]", "bf16[9,2,7]"),
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=fb0_i0o->b0f",
            2 * 2 * 9 * 5 * 7,
        ),
        (
            ("f32[6,7,1]", "bf16[6,2,5]", "bf16[2,5,7]"),
            "window={size=2}, dim_labels=b0f_0io->bf0",
            2 * 2 * 6 * 5 * 7,
        ),
    ],
    ids=["plain", "transposed", "batched", "two blocks", "summed blocks"],
)
def test_matmuls_as_the_tpu_writes_them(shapes, attributes, flops):
    out, left, right = shapes
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {out} convolution(%a, %b), {attributes}\n}}\n"
    )
    assert matmul_flops(Module(text)) == flops


def layer(x, w):
    return jnp.tanh(x @ w)


def test_without_loops_the_compiler_counts_the_same():
    def function(x, w, v, i):
        y = jax.nn.softmax(layer(x, w) @ v, axis=-1)
        row = jax.lax.dynamic_slice(x, (i, 0), (4, 64))
        return y, jax.lax.dynamic_update_slice(x, 2 * row, (0, 0))

    program = compiled(
        function, struct(512, 64), struct(64, 256), struct(256, 32), struct(dtype=jnp.int32)
    )
    module, reported = Module(program.as_text()), program.cost_analysis()
    matmuls = 2 * 512 * 64 * 256 + 2 * 512 * 256 * 32
    assert matmul_flops(module) == matmuls
    assert 0 <= reported["flops"] - matmuls < 0.02 * matmuls  # plus elementwise work
    assert memory_traffic(module) == pytest.approx(reported["bytes accessed"], rel=0.01)


def test_a_scan_costs_its_body_as_often_as_it_runs():
    def function(x, w, length):
        return jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=length)[0]

    arguments = struct(128, 64), struct(64, 64)
    body, looped = (
        Module(compiled(partial(function, length=n), *arguments).as_text()) for n in (1, TRIPS)
    )
    assert matmul_flops(looped) == TRIPS * matmul_flops(body) == TRIPS * 2 * 128 * 64 * 64
    least = TRIPS * (2 * 128 * 64 + 64 * 64) * 4
    assert least <= memory_traffic(looped) < 2.5 * least


def test_slices_of_a_stack_do_not_cost_the_stack():
    def function(x, stack):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stack)[0]

    module = Module(compiled(function, struct(8, 64), struct(100, 64, 64)).as_text())
    stack = 100 * 64 * 64 * 4
    assert stack <= memory_traffic(module) < 5 * stack < 100 * stack


NESTED = """HloModule jit_f, entry_computation_layout={()->f32[]}

%view (v: bf16[8,2,1,512]) -> bf16[8,2,512] {
  %v = bf16[8,2,1,512]{3,2,1,0} parameter(0)
  ROOT %seen = bf16[8,2,512]{2,1,0} bitcast(%v)
}

%attend (q: bf16[8,2], keys: bf16[8,2,1,512]) -> f32[8,512] {
  %q = bf16[8,2]{1,0} parameter(0)
  %keys = bf16[8,2,1,512]{3,2,1,0} parameter(1)
  %flat = bf16[8,2,512]{2,1,0} fusion(%keys), kind=kLoop, calls=%view
  ROOT %scores = f32[8,512]{1,0} custom-call(%q, %flat), custom_call_target="dot"
}

%put (ring: bf16[8,512], new: bf16[8,1], at: s32[]) -> bf16[8,512] {
  %ring = bf16[8,512]{1,0} parameter(0)
  %new = bf16[8,1]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %written = bf16[8,512]{1,0} dynamic-update-slice(%ring, %new, %at, %at)
}

%put_and_read (ring: bf16[8,512], new: bf16[8,1], at: s32[]) -> bf16[8,512] {
  %ring = bf16[8,512]{1,0} parameter(0)
  %new = bf16[8,1]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %written = bf16[8,512]{1,0} dynamic-update-slice(%ring, %new, %at, %at)
  ROOT %negated = bf16[8,512]{1,0} negate(%written)
}

ENTRY %main (q: bf16[8,2], keys: bf16[8,2,1,512], ring: bf16[8,512], new: bf16[8,1], at: s32[]) -> f32[] {
  %q = bf16[8,2]{1,0:S(1)} parameter(0)
  %keys = bf16[8,2,1,512]{3,2,1,0} parameter(1)
  %ring = bf16[8,512]{1,0} parameter(2)
  %new = bf16[8,1]{1,0:S(1)} parameter(3)
  %at = s32[]{:S(6)} parameter(4)
  ROOT %out = OPERATION
}
"""  # noqa: E501
RING, KEYS = 8 * 512 * 2, 8 * 2 * 512 * 2
FETCH = "(bf16[8,512]{1,0:S(1)}, bf16[8,512]{1,0}, u32[]{:S(2)}) copy-start(%ring)"


@pytest.mark.parametrize(
    ("operation", "traffic"),
    [
        # The operand passes through a bitcast in a nested fusion.
        ("f32[8,512]{1,0:S(1)} fusion(%q, %keys), kind=kOutput, calls=%attend", KEYS),
        # One column is written in place.
        ("bf16[8,512]{1,0} fusion(%ring, %new, %at), kind=kLoop, calls=%put", 8 * 2),
        # A reader of the updated array reads all of it.
        (
            "bf16[8,512]{1,0:S(1)} fusion(%ring, %new, %at), kind=kLoop, calls=%put_and_read",
            RING,
        ),
        # A quarter of the ring moves into the core's own memory.
        (
            "((bf16[8,512]{1,0}), bf16[2,512]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%ring), "
            "slice={[0:2], [0:512]}",
            RING / 4,
        ),
        # The ring arrives at the start, unless the end of the previous call has already fetched it.
        (
            f"{FETCH}, cross_program_prefetch_index=0\n  %again = {FETCH}",
            RING,
        ),
    ],
    ids=["view", "update", "update and read", "slice", "prefetch"],
)
def test_what_a_tpu_program_reads(operation, traffic):
    assert memory_traffic(Module(NESTED.replace("OPERATION", operation))) == traffic


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (381.47G) exceeds available HBM (95.74G).",
            381.47 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
            "hbm. Used 900.50M of 15.75G hbm. Exceeded hbm capacity by 1.5G.",
            900.5 * 2**20,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17M of 16M vmem.", None),
    ],
)
def test_the_error_of_a_program_that_is_too_large(message, needed):
    assert out_of_memory(message) == needed


def test_the_branch_that_computes_most_counts():
    """A loop over a conditional of three branches: all rows, half of them, none."""

    def step(i, x):
        branches = (jnp.zeros_like, lambda x: x.at[:4].set(x[:4] @ x), lambda x: x @ x)
        return jnp.sin(jax.lax.switch(i % 3, branches, x))

    text = compiled(lambda x: jax.lax.fori_loop(0, TRIPS, step, x), struct(8, 8)).as_text()
    assert "conditional" in text
    module = Module(text)
    assert matmul_flops(module) == TRIPS * 2 * 8**3
    assert matmul_flops(module.skipping()) == 0
    assert 0 < memory_traffic(module.skipping()) < memory_traffic(module)
