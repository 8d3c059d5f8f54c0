"""Forecasts at real lengths: distributions, files, and closed forms on made-up costs."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from drpo_jax import costs, preflight
from drpo_jax.costs import Chip, Cost
from drpo_jax.costs.chips import has_libtpu
from drpo_jax.errors import BadInput
from drpo_jax.forecast import Lengths, forecast, forecast_text, hardware_limits, parse_lengths
from drpo_jax.forecast import step as forecast_step
from drpo_jax.forecast.lengths import quantiles
from drpo_jax.forecast.step import batch_seconds, filled, mini_batches
from drpo_jax.learner.rollout_file import write_rollouts
from drpo_jax.models import cache
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs
from tests.runs import smallest

# Rates that are powers of two, so that products and quotients are exact.
CHIP = Chip("made up", 1e9, {"bfloat16": 2.0**40}, bandwidth=2.0**30, links=2.0**20)
PROMPT, LONGEST = 6, 100
SIZES = {
    "sampler.max_prompt_length": PROMPT, "sampler.max_response_length": LONGEST, "sampler.slots": 4,
    "sampler.decode_steps": 8, "compute.dtype": "bfloat16", "sft.steps": 0, "train.prompts": 4,
    "train.samples": 4, "train.mini_batch_prompts": 2, "train.micro_batch": 2, "train.pack": True,
    "objective.behavior": "rescored",
}  # fmt: skip


def new_programs(**fields):
    config = smallest(SIZES, **fields)
    return Programs(config, make_mesh(**config.mesh, devices=jax.devices()[:1]), stop=(1,))


@pytest.fixture(scope="module")
def programs():
    return new_programs()


def made_up(programs):
    """A cost for every program: 1 s of HBM traffic a call, 0.25 s if all micro-batches are empty."""
    seconds, idle = ({"compute": 0.0, "memory": s, "links": 0.0} for s in (1.0, 0.25))
    known = dict(compile_seconds=0.0, arguments={}, resident={}, results=0.0, temporaries=0.0)
    return [
        Cost(
            program, available=1e9, work=None, traffic=2.0**30, seconds=seconds,
            idle=idle, **known,
        )
        for program in preflight.program_list(programs)
    ]  # fmt: skip


def constant(programs, response, prompt=PROMPT):
    train = programs.config.train
    shape = train.prompts, train.samples
    return Lengths(np.full(shape[0], prompt), np.full(shape, response), "constant lengths")


# --------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    ("mean", "longest", "count"), [(1500, 8192, 512), (4340, 8192, 4096), (7000, 8192, 64)]
)
def test_quantiles_have_the_mean_after_the_cut(mean, longest, count):
    lengths = quantiles(mean, longest, count)
    assert lengths.mean() == pytest.approx(mean, abs=0.5)
    assert 1 <= lengths[0] and lengths[-1] == longest and np.all(np.diff(lengths) >= 0)


def test_without_a_cut_the_99th_percentile_is_ten_times_the_median():
    lengths = quantiles(1e5, 10**9, 10001)
    assert lengths[9900] / lengths[5000] == pytest.approx(10, rel=0.05)
    assert lengths.std() / lengths.mean() == pytest.approx(np.sqrt(np.e - 1), rel=0.05)


def test_the_ends_of_the_range_are_constant():
    assert quantiles(8192, 8192, 100).tolist() == [8192] * 100
    assert quantiles(1, 8192, 100).tolist() == [1] * 100


def test_a_specification(programs):
    lengths = parse_lengths("mean:20,max:64", programs.config)
    assert lengths.prompts.tolist() == [PROMPT] * 4 and lengths.responses.shape == (4, 4)
    assert np.array_equal(np.sort(lengths.responses.reshape(-1)), quantiles(20, 64, 16))
    again = parse_lengths("max:64,mean:20,prompt:3", programs.config)
    assert again.prompts.tolist() == [3] * 4
    assert np.array_equal(again.responses, lengths.responses)
    other = parse_lengths("mean:20,max:64", smallest(SIZES, seed=1))
    assert not np.array_equal(other.responses, lengths.responses)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median:3", "unknown key 'median'. The keys are mean: mean tokens of a response; max: "),
        ("1500", "neither KEY:NUMBER pairs, such as mean:1500,max:8192, nor a rollout file"),
        ("rollouts.json", r"nor a rollout file \(.parquet or .npz\)"),
        ("max:64", "mean is missing, for example mean:1500"),
        ("mean:many", "mean must be a number, got 'many'"),
        ("mean:3,max:4.5", "max must be an integer, got '4.5'"),
        ("mean:65,max:64", "mean must be from 1 to max = 64, got 65"),
        ("mean:nan", "mean must be from 1 to max = 100, got nan"),
        ("mean:0", "mean must be from 1 to max = 100, got 0"),
        ("mean:3,max:101", "max must be from 1 to sampler.max_response_length = 100, got 101"),
        ("mean:3,prompt:7", "prompt must be from 1 to sampler.max_prompt_length = 6, got 7"),
    ],
)
def test_mistakes(programs, text, message):
    with pytest.raises(ValueError, match=message):
        parse_lengths(text, programs.config)


# ----------------------------------------------------------------------------------------- files


def write(path, prompts, responses):
    """Writes a rollout file with responses of these lengths, int [P] and [P, G]."""
    each = [(g, p, r) for g, (p, row) in enumerate(zip(prompts, responses)) for r in row]
    table = {
        "group": [g for g, _, _ in each],
        "prompt_ids": [[1] * p for _, p, _ in each],
        "response_ids": [[2] * r for _, _, r in each],
        "full_logp": [[-1.0] * r for _, _, r in each],
        "reward": [0.0] * len(each),
        "finish_reason": ["stop"] * len(each),
        "version": [[0] * r for _, _, r in each],
    }
    write_rollouts(path, pa.table(table))


def test_a_file_gives_the_forecast_of_its_lengths(programs, tmp_path):
    drawn = parse_lengths("mean:20,max:64,prompt:3", programs.config)
    path = tmp_path / "rollouts.parquet"
    write(path, drawn.prompts.tolist(), drawn.responses.tolist())
    ours, theirs = (
        forecast(programs, lengths, made_up(programs), CHIP)
        for lengths in (drawn, parse_lengths(str(path), programs.config))
    )
    assert ours["lengths"].pop("source") != theirs["lengths"].pop("source")
    assert ours == theirs and ours["step_seconds"] > 0


def test_a_smaller_file_repeats(programs, tmp_path):
    write(path := tmp_path / "few.parquet", [2, 5, 1], [[10, 20], [30, 40], [50, 60]])
    lengths = parse_lengths(str(path), programs.config)
    assert lengths.prompts.tolist() == [2, 5, 1, 2]
    assert lengths.responses.tolist()[0] == lengths.responses.tolist()[3] == [10, 20, 10, 20]


def test_unreadable_files(programs, tmp_path):
    with pytest.raises(OSError, match="missing.npz"):
        parse_lengths(str(tmp_path / "missing.npz"), programs.config)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn.parquet: not a readable Parquet file"):
        parse_lengths(str(tmp_path / "torn.parquet"), programs.config)
    write(path := tmp_path / "long.parquet", [2], [[LONGEST + 1]])
    with pytest.raises(ValueError, match=r"101 tokens, but sampler.max_response_length = 100"):
        parse_lengths(str(path), programs.config)


# ---------------------------------------------------------------------------------- closed forms


def test_the_longest_lengths_are_the_worst_case():
    """One ring size, no free slot, all micro-batches filled: only the first tokens differ."""
    programs = new_programs(sampler__decode_steps=128)
    figures = forecast(programs, constant(programs, LONGEST), made_up(programs), CHIP)
    worst, seconds = figures["worst_case"], figures["seconds"]
    waves = 4 * 4 // 4
    assert figures["schedule"]["steps"] == waves * (LONGEST - 1)
    assert figures["schedule"]["live_slots"] == 4
    # Prefill samples the first token of a response.
    assert seconds["decode"] == pytest.approx(worst["decode"] * (LONGEST - 1) / LONGEST)
    for phase in ("sync", "prefill", "rescore", "update"):
        assert seconds[phase] == worst[phase] > 0, phase
    assert figures["limits"] == hardware_limits(programs, CHIP, *preflight.longest(programs.config))
    tokens = 16 * LONGEST / sum(seconds.values())
    assert figures["tokens_per_second"] == pytest.approx(tokens)


@pytest.mark.skipif(not has_libtpu(), reason="needs the TPU compiler")
def test_a_forecast_needs_no_device():
    """Rings grow while it runs, on a mesh of TPUs that nobody has."""
    devices, chip = costs.get_devices("v5e:2x2")
    config = smallest(SIZES, train__micro_batch=4)
    programs = Programs(config, make_mesh(**config.mesh, devices=devices), stop=(1,))
    figures = forecast(programs, constant(programs, LONGEST), made_up(programs), chip)
    assert figures["schedule"]["largest_ring"] > figures["schedule"]["columns"]


def test_smaller_rings_save_the_bytes_of_their_columns(programs):
    """Responses of eight tokens stay in the smallest ring that holds them and their prompts."""
    [decode] = [cost for cost in made_up(programs) if cost.program.name == "decode"]
    rings = decode.program.arguments["caches"].caches
    columns = rings[0].columns
    figures = forecast(programs, constant(programs, 8), made_up(programs), CHIP)
    assert figures["schedule"]["columns"] == figures["schedule"]["largest_ring"] == 16 < columns
    moved = costs.decode_bytes(programs.model_config, weights=0.0)
    saved = programs.sampler.slots * moved.token * (columns - 16)
    assert costs.device_bytes(rings) == programs.sampler.slots * moved.token * columns
    step = (2.0**30 / 8 - saved) / 2.0**30
    assert figures["seconds"]["decode"] == pytest.approx(4 * 7 * step)
    # The seven steps of a response read the prompt and 1 to 7 tokens.
    assert figures["schedule"]["context"] == PROMPT + 4


def test_the_kernel_copies_the_blocks_of_live_slots(programs, monkeypatch):
    """As before, but a decode step copies blocks of 4 columns of the rows that are live."""
    for module in (cache, forecast_step):
        monkeypatch.setattr(module, "copied_columns", lambda ring, device: 4)
    lengths = constant(programs, 8)
    costs_of = {cost.program.name: cost for cost in made_up(programs)}
    decode = costs_of["decode"]
    rings = decode.program.arguments["caches"].caches
    largest, live = rings[0].columns, 0.75
    program = dataclasses.replace(decode.program, live=live)
    decode = dataclasses.replace(decode, program=program)
    schedule = forecast(programs, lengths, made_up(programs), CHIP)["schedule"]
    # Every slot is live in each step, with PROMPT + 4 tokens on average.
    copied = PROMPT + 4 + 3
    ring_bytes = costs.device_bytes(rings)
    seconds = 2.0**30 / 8 - ring_bytes * (live - copied / largest)
    measured = [*(c for name, c in costs_of.items() if name != "decode"), decode]
    figures = forecast(programs, lengths, measured, CHIP)
    assert figures["seconds"]["decode"] == pytest.approx(4 * 7 * seconds / 2.0**30)
    assert schedule["live_slots"] == programs.sampler.slots


def test_an_update_computes_the_micro_batches_with_sequences(programs):
    """Responses of 10 tokens: six sequences per row of 106 leave one of four micro-batches filled."""
    lengths = constant(programs, 10)
    layouts = mini_batches(programs, lengths)
    assert [layout.micro_batches for layout in layouts] == [4, 4]
    assert list(map(filled, layouts)) == [1, 1]
    figures = forecast(programs, lengths, made_up(programs), CHIP)
    assert figures["batches"]["filled"] == 2 and figures["batches"]["micro_batches"] == 8
    assert figures["batches"]["padding"] == pytest.approx(1 - 2 * 8 * 16 / (2 * 2 * 106))
    assert figures["seconds"]["update"] == 2 * (0.25 + 0.75 / 4)
    assert figures["seconds"]["rescore"] == figures["seconds"]["update"]


def test_batches_by_tokens():
    """Rows as narrow as their sequences: as many tokens, fewer micro-batches than unpacked rows."""
    programs = new_programs(train__micro_batch=0, train__micro_tokens=224)
    figures = forecast(programs, constant(programs, 10), made_up(programs), CHIP)
    layouts = mini_batches(programs, constant(programs, 10))
    assert programs.micro_batches == 4 and figures["batches"]["filled"] == 2
    assert all(layout.shape == programs.update_shape for layout in layouts)


def test_an_update_needs_at_least_the_flops_of_the_equations(programs):
    update = next(cost for cost in made_up(programs) if cost.program.name == "update")
    [layout, _] = mini_batches(programs, constant(programs, 10))
    assert batch_seconds(update, layout, 3 * 2.0**40, programs, CHIP) == 3
    assert batch_seconds(update, layout, 2.0**30, programs, CHIP) < 1


def test_without_packing_every_micro_batch_counts():
    programs = new_programs(train__pack=False)
    figures = forecast(programs, constant(programs, 10), made_up(programs), CHIP)
    assert figures["batches"]["filled"] == figures["batches"]["micro_batches"]
    assert figures["seconds"]["update"] == figures["worst_case"]["update"]


# ------------------------------------------------------------------------------------ the output


def test_the_text(programs):
    figures = forecast(programs, parse_lengths("mean:20", programs.config), made_up(programs), CHIP)
    text = forecast_text(figures)
    assert "16 responses, log-normal lengths (sigma 1) cut off at 100:" in text
    assert re.search(
        r"\n  decoding  \d+ steps in \d+ device calls; \d\.\d of 4 slots are live", text
    )
    assert "in a live slot on average; rings of" in text and "not measurements" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith("forecast ")]
    seconds = [*figures["seconds"].values(), figures["step_seconds"]]
    assert [float(value) for value in row[1:]] == pytest.approx(seconds, rel=0.01)
    unknown = forecast(programs, constant(programs, 10), [], CHIP)
    assert unknown["schedule"]["steps"] == 4 * 9 and unknown["seconds"] is None
    assert "times are unknown" in forecast_text(unknown)


def test_preflight_writes_the_forecast(monkeypatch, tmp_path, capsys):
    config = smallest(SIZES)
    monkeypatch.setattr(costs, "get_devices", lambda _: (jax.devices()[:1], CHIP))
    monkeypatch.setattr(preflight, "measure", lambda *_: made_up(new_programs()))
    file = tmp_path / "figures.json"
    assert preflight.main(config, "made:up", str(file), lengths="mean:20") == 0
    assert "Forecast for 16 responses" in capsys.readouterr().out
    written = json.loads(Path(file).read_text())["forecast"]
    assert written["seconds"].keys() == {"sync", "prefill", "decode", "rescore", "update"}
    assert written["step_seconds"] < sum(written["worst_case"].values())
    with pytest.raises(BadInput, match="--lengths=mean:101: mean must be from 1 to max = 100"):
        preflight.main(config, "made:up", lengths="mean:101")
