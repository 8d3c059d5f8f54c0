"""Cost as a function of the number of chips and of sequence length, from programs compiled for TPU v5p.

    python -m benchmarks.scaling [--models=qwen3_4b_base,qwen3_30b_a3b] [--workdir=runs/scaling]
        [--output=FILE.json] [--plot=FILE.png]

The model has `LAYERS` of its layers, and embedding and head in full; a chip processes one sequence
at a time. One sweep goes from 8 to 256 chips with 256 sequences of 4K tokens per update, the other
from 2K to 32K tokens on 32 chips. `drpo_jax.preflight` compiles the learner's update and a round of
decoding for each point, in a separate process, and counts for one chip and one call: FLOPs, bytes
read and written in HBM, bytes sent, and memory. A compiled point is not compiled again; use another
workdir after changing the code.
"""

import json
import subprocess
import sys

from absl import app, flags
from matplotlib.figure import Figure

from benchmarks.common import OUTPUT, write_results
from drpo_jax.parallel import MESH_AXES
from drpo_jax.storage import path_of

MODELS = flags.DEFINE_list("models", ["qwen3_4b_base", "qwen3_30b_a3b"], "Names of config files.")
WORKDIR = flags.DEFINE_string("workdir", "runs/scaling", "Directory of the points, one file each.")
PLOT = flags.DEFINE_string("plot", None, "File of the figure.")
LAYERS, SEQUENCES, PROMPT, ROUND = 4, 256, 1024, 16
# Number of chips: topology of a v5p slice.
SLICES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
LENGTHS = [2048, 4096, 8192, 16384, 32768]
SWEEPS = {
    "chips": [(chips, 4096) for chips in SLICES],
    "tokens of a sequence": [(32, length) for length in LENGTHS],
}
AMOUNTS = {
    "TFLOP": lambda p: p["flops"]["compiled"] / 1e12,
    "GB read and written in HBM": lambda p: p["hbm_bytes"] / 1e9,
    "GB sent": lambda p: sum(p["sent"].values()) / 1e9,
    "GiB of memory": lambda p: p["memory"]["total"] / 2**30,
}
PROGRAMS = {"update": "-", "decode": "--"}


def compile_point(model, chips, length):
    """Returns the figures of one point by program, from preflight's JSON."""
    file = path_of(WORKDIR.value) / f"{model}_{chips}_{length}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        fields = {
            "model.layers": LAYERS,
            "mesh.data": 1,
            "mesh.fsdp": -1,  # All chips, except for the config's mesh.expert.
            "mesh.tensor": 1,
            **{f"sampler_mesh.{axis}": 0 for axis in MESH_AXES},  # As the learner.
            "train.prompts": SEQUENCES // 8,
            "train.samples": 8,
            "train.mini_batch_prompts": SEQUENCES // 8,
            "train.micro_batch": chips,
            "sampler.slots": SEQUENCES,
            "sampler.max_prompt_length": PROMPT,
            "sampler.max_response_length": length - PROMPT,
            "sampler.decode_steps": ROUND,
        }
        command = [sys.executable, "-m", "drpo_jax.preflight", f"--config=configs/{model}.py"]
        command += [f"--topology=v5p:{SLICES[chips]}", f"--json={file}"]
        command += [f"--programs={','.join(PROGRAMS)}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(file.read_text())["programs"]


def plot(results, file):
    """Plots the amounts (rows) over the sweeps (columns) by model and program, on log-log axes."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    axes = figure.subplots(len(AMOUNTS), len(SWEEPS), sharex="col", sharey="row")
    for column, (sweep, points) in enumerate(SWEEPS.items()):
        values = [point[column] for point in points]
        for row, amount in enumerate(AMOUNTS):
            ax = axes[row, column]
            for color, model in enumerate(MODELS.value):
                for program, line in PROGRAMS.items():
                    series = [
                        results[f"{model}: {c} chips, {n} tokens"][program] for c, n in points
                    ]
                    heights = [figures[amount] for figures in series]
                    ax.plot(
                        values, heights, f"o{line}", color=f"C{color}", label=f"{model}, {program}"
                    )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(values, [f"{v:,}" for v in values])
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(amount)
        ax.set_xlabel(sweep)
    fixed = ("4,096 tokens a sequence", "32 chips")
    for ax, text in zip(axes[0], fixed):
        ax.set_title(text)
    figure.suptitle(
        f"One chip, one call: an update on {SEQUENCES} sequences, {ROUND} steps of decoding them; "
        f"{LAYERS} layers"
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


def main(_):
    results = {}
    for model in MODELS.value:
        print(f"{model}\n{'chips':>6}{'tokens':>8}  {'program':<8}", *(f"{a:>27}" for a in AMOUNTS))
        for chips, length in sorted({point for points in SWEEPS.values() for point in points}):
            programs = compile_point(model, chips, length)
            name = f"{model}: {chips} chips, {length} tokens"
            results[name] = {
                program: {
                    a: float(f"{amount(programs[program]):.4g}") for a, amount in AMOUNTS.items()
                }
                for program in PROGRAMS
            }
            for program, figures in results[name].items():
                cells = (f"{x:>27,.4g}" for x in figures.values())
                print(f"{chips:>6}{length:>8}  {program:<8}", *cells, flush=True)
    if OUTPUT.value:
        command = f"python -m benchmarks.scaling --models={','.join(MODELS.value)}"
        write_results(OUTPUT.value, command, results)
    if PLOT.value:
        plot(results, PLOT.value)


if __name__ == "__main__":
    app.run(main)
