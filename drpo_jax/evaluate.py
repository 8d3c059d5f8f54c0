"""Held-out accuracy: python -m drpo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny

Evaluates the last checkpoint of the run in the workdir (the warm start's, where RL has none yet), or the
one of --step, unquantized, on `config.evaluate`: a held-out part of the training problems, or
`evaluate.sets`, such as aime24,aime25. Where the workdir holds no run, the model of --config.model.path
itself. The config may differ from the run's in all but the model, and the run is left as it is. Writes

  evaluate.json     checkpoint, step, k, temperature, …, and `accuracy`: for "all" problems and for each
                    kind their number and, by metric (avg@k, pass@j for j = 2, 4, … and k, maj@k,
                    greedy), {"mean", "low", "high"}: shares, with the 95 % bootstrap interval
  evaluations/…/    of each evaluation: result.json, the same; problems.tsv, a line per problem, the
                    hardest first; responses.jsonl, one object per response (problem, mode avg or greedy,
                    text, reward, tokens)

and prints a table. Stopped and started again with the same config, it goes on. Several machines share
the work by --shard=1/4 to --shard=4/4; without it, the same command then joins them.
"""

import contextlib
import hashlib
import json
import math
import re
import time

import jax
import numpy as np
from absl import flags

from drpo_jax import cli, loop
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.config import flatten, run_config
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.parallel import multihost
from drpo_jax.problems import encode
from drpo_jax.rewards import ANSWER
from drpo_jax.statistics import bootstrap_interval, majority, pass_at_k
from drpo_jax.storage import Lines, write_whole

SHARD = flags.DEFINE_string("shard", "1/1", "The part of the problems to evaluate, such as 1/4.")


STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the last one if not given.")


def main(config, workdir, shard="1/1", step=None):
    directory = check_workdir(workdir, config)
    run = loop.Run(config, workdir, train=False)
    places = share(shard, len(run.heldout))
    whole = len(places) == len(run.heldout)
    with jax.set_mesh(run.mesh):
        if directory is None:
            checkpoint, step, model = config.model.path, 0, loop.initial_model(run)
        else:
            with bad_input(), Checkpoints(directory) as checkpoints:
                step = checkpoints.latest_step() if step is None else step
                checkpoint = str(directory / str(step))
                if step not in checkpoints.steps():
                    found = ", ".join(map(str, checkpoints.steps()))
                    raise BadInput(f"--step={step}: there is no such checkpoint; there are {found}")
                like = {"model": run.programs.abstract_state.model}
                model = checkpoints.restore(step, like)["model"]
        settings = {
            "checkpoint": checkpoint,
            "step": step,
            "sets": config.evaluate.sets or "held out",
            "k": config.evaluate.samples,
            "temperature": config.evaluate.temperature,
            "greedy": config.evaluate.greedy,
            "max_response_length": config.sampler.max_response_length,
            "reward": config.reward.name,
            "seed": config.seed,
            "prompts": asked_hash(run),
        }
        folder = workdir / "evaluations" / folder_name(settings)
        if multihost.is_main():
            folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"responses{'' if whole else '-' + shard.replace('/', '-of-')}.jsonl"
        print(
            f"{len(run.heldout)} problems ({settings['sets']}), {settings['k']} responses each at "
            f"temperature {settings['temperature']}; reward {settings['reward']!r}, instruction "
            f"{config.data.instruction!r}" + (f", system {config.data.system!r}" * config.data.chat)
        )
        text = json.dumps(resumed(folder, own, settings) if multihost.is_main() else [])
        told = multihost.gather("responses so far", text=np.frombuffer(text.encode(), np.uint8))
        generations = json.loads(told[0]["text"].tobytes())
        progress = Progress(config, [run.heldout[i].id for i in places], generations)
        kept = own.read_text() if multihost.is_main() and own.exists() else ""
        with Lines(own, kept) if multihost.is_main() else contextlib.nullcontext() as file:

            def keep(new):
                if file:
                    file.write("".join(json.dumps(g) + "\n" for g in new))
                progress(new)

            loop.evaluate(run, model, generations, keep, places)
    if not multihost.is_main():
        return
    if not whole:
        print(f"shard {shard} is done; without --shard the same command joins the shards")
        return
    problems = by_problem(generations, ANSWER.get(config.reward.name, str.strip))
    lengths = {
        "mean_tokens": float(np.mean([g["tokens"] for g in generations])),
        "cut_off": float(np.mean([not g["finished"] for g in generations])),
    }
    found = accuracy(problems)
    result = json.dumps(settings | lengths | {"accuracy": found}, indent=2) + "\n"
    (workdir / "evaluate.json").write_text(result)
    (folder / "result.json").write_text(result)
    (folder / "problems.tsv").write_text(problem_table(problems))
    print(f"{checkpoint}: accuracy ({settings['sets']}), % (95 % interval)\n")
    print(table(found))
    print(
        f"\n{lengths['mean_tokens']:.0f} tokens in the mean, {100 * lengths['cut_off']:.1f} % cut off "
        f"at {settings['max_response_length']}; by problem, and every response: {folder}"
    )


def asked_hash(run):
    """Of all that decides about a response besides the weights: prompts as token ids, what ends it;
    and of the answers."""
    prompts = encode(run.config, run.tokenizer, run.heldout)
    asked = [[p.id, p.answer, ids] for p, ids in zip(run.heldout, prompts)]
    text = json.dumps([asked, run.tokenizer.stop_ids])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_name(settings):
    """Such as step_000300-aime24_aime25-1a2b3c4d: other settings, another folder."""
    sets = re.sub(r"[^a-zA-Z0-9]+", "_", settings["sets"])[-40:].strip("_")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"step_{settings['step']:06d}-{sets}-{digest}"


def share(text, problems):
    """The places of the problems that a shard "i/n" evaluates, a range.

    Raises:
      BadInput: another text.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise BadInput(f"--shard={text}: must be a part and their number, such as 1/4")
    return range((i - 1) * problems // n, i * problems // n)


def resumed(folder, own, settings):
    """The responses that this evaluation and its shards have left, those of whole problems.

    The `own` file of this process is cut to them; what other processes write is read only.
    """
    samples, groups = {"avg": settings["k"], "greedy": 1}, {}
    for file in {own, *folder.glob("responses*.jsonl")}:
        found = {}
        for line in file.read_text().split("\n")[:-1] if file.exists() else ():
            g = json.loads(line)  # the last line, which may be cut off, is left out
            found.setdefault((g["mode"], g["id"]), []).append(g)
        found = {key: group for key, group in found.items() if len(group) == samples[key[0]]}
        if file == own:
            lines = [json.dumps(g) + "\n" for group in found.values() for g in group]
            write_whole(own, "".join(lines))
        groups |= found
    return [g for group in groups.values() for g in group]


class Progress:
    """A line every few seconds: responses, accuracy so far, tokens per second, time that is left."""

    def __init__(self, config, ids, generations):
        ids = set(ids)
        self.total = len(ids) * (config.evaluate.samples + config.evaluate.greedy)
        self.done = sum(g["id"] in ids for g in generations)
        self.right, self.tokens, self.new = 0.0, 0, 0
        self.started = time.monotonic()
        self.told = -math.inf
        if self.done:
            print(f"going on after {self.done} of {self.total} responses")

    def __call__(self, new):
        self.done += len(new)
        self.new += len(new)
        self.right += sum(g["reward"] for g in new)
        self.tokens += sum(g["tokens"] for g in new)
        seconds = time.monotonic() - self.started
        if seconds < self.told + 2 and self.done < self.total:
            return
        self.told = seconds
        left = seconds / self.new * (self.total - self.done)
        print(
            f"{self.done:>8}/{self.total} responses   right {100 * self.right / self.new:5.1f} %   "
            f"{self.tokens / seconds:,.0f} tokens/s   {left / 60:.0f}m{left % 60:02.0f}s left"
        )


def check_workdir(workdir, config):
    """The directory of the checkpoints to evaluate; None where the model of model.path is meant.

    Raises:
      BadInput: the workdir holds no run and the config names no model, or holds another model's, one
        without a checkpoint, or one that trained on problems that this config holds out.
    """
    if not (workdir / "config.json").exists():
        if config.model.path:
            return None
        raise BadInput(
            f"{workdir} holds no run (there is no config.json); give the --workdir of one, or "
            "--config.model.path"
        )
    theirs = flatten(run_config(workdir))
    ours = flatten(config)
    # With a file of problems, these fields decide which of them are held out.
    same = ours["data.problems"] == theirs["data.problems"] != "" and not ours["evaluate.sets"]
    split = ("seed", "evaluate.problems") if same else ()
    differing = [
        f"{field}: {theirs[field]!r} -> {ours[field]!r}"
        for field in ours
        if (field.startswith("model.") or field in split)
        and ours[field] != theirs[field]
        and field != "model.path"
    ]
    if differing:
        raise BadInput(
            f"{workdir} holds a run with another model or other held-out problems (its value -> "
            "this config's value):\n  " + "\n  ".join(differing)
        )
    for directory in (workdir / "checkpoints", workdir / "sft" / "checkpoints"):
        with Checkpoints(directory) as checkpoints:
            if checkpoints.latest_step() is not None:
                return directory
    raise BadInput(f"{workdir} has no checkpoint yet")


def by_problem(generations, answer):
    """One dict per problem: id, kind, answer; avg and greedy, lists of (answer given, reward); tokens
    and cut, lists over its responses.

    Args:
      generations: of `loop.evaluate`.
      answer: the answer that a response gives, None where it gives none: `rewards.ANSWER`.
    """
    problems = {}
    for g in generations:
        fresh = {"avg": [], "greedy": [], "tokens": [], "cut": []}
        known = {name: g[name] for name in ("id", "kind", "answer")}
        problem = problems.setdefault(g["id"], known | fresh)
        problem[g["mode"]].append((answer(g["response"]), g["reward"]))
        problem["tokens"].append(g["tokens"])
        problem["cut"].append(not g["finished"])
    return list(problems.values())


def accuracy(problems):
    """The metrics of `evaluate.json` by kind of problem, of `by_problem`."""
    groups = {"all": problems}
    kinds = sorted({problem["kind"] for problem in problems})
    for kind in kinds if len(kinds) > 1 else ():
        groups[kind] = [problem for problem in problems if problem["kind"] == kind]
    return {name: {"problems": len(group)} | _estimates(group) for name, group in groups.items()}


def problem_table(problems):
    """A table with tabs: a line per problem, the hardest first."""
    columns = "id kind avg maj most_frequent right greedy tokens cut_off".split()
    lines = []
    for p in problems:
        votes, rewards = zip(*p["avg"])
        given = [vote for vote in votes if vote is not None]
        often = max(given, key=given.count, default="")
        greedy = f"{p['greedy'][0][1]:g}" if p["greedy"] else ""
        cells = [
            p["id"], p["kind"], f"{np.mean(rewards):.3f}", f"{majority(votes, rewards):g}", often,
            p["answer"], greedy, f"{np.mean(p['tokens']):.0f}", f"{np.mean(p['cut']):.3f}",
        ]  # fmt: skip
        cells = [" ".join(cell.split())[:80] for cell in cells]
        lines.append((np.mean(rewards), "\t".join(cells)))
    lines.sort(key=lambda line: line[0])
    return "\n".join(["\t".join(columns), *(line for _, line in lines)]) + "\n"


def _estimates(problems):
    right = np.array([[reward for _, reward in problem["avg"]] for problem in problems])
    k = right.shape[1]
    values = {f"avg@{k}": right.mean(1)}
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    values |= {f"pass@{j}": pass_at_k(right, j) for j in sizes if j > 1}
    values[f"maj@{k}"] = [majority(*zip(*problem["avg"])) for problem in problems]
    if problems[0]["greedy"]:
        values["greedy"] = [problem["greedy"][0][1] for problem in problems]
    intervals = {name: bootstrap_interval(v) for name, v in values.items()}
    return {
        name: {"mean": float(np.mean(v)), "low": intervals[name][0], "high": intervals[name][1]}
        for name, v in values.items()
    }


def table(accuracy):
    """The accuracies in percent as an aligned text table."""
    names = [name for name in accuracy["all"] if name != "problems"]
    width = max(map(len, accuracy)) + 2
    lines = [f"{'':<{width}}{'problems':>8}" + "".join(f" | {name:^19}" for name in names)]
    lines.append("-" * (width + 8) + ("-+-" + "-" * 19) * len(names))
    for group, metrics in accuracy.items():
        cells = [[100 * metrics[name][part] for part in ("mean", "low", "high")] for name in names]
        row = "".join(f" | {mean:>5.1f} ({low:>5.1f}–{high:>5.1f})" for mean, low, high in cells)
        lines.append(f"{group:<{width}}{metrics['problems']:>8}{row}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.launch(lambda config, workdir: main(config, workdir, SHARD.value, STEP.value))
