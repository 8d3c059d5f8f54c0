"""This project beside PyTorch with transformers, TRL, and Tunix, in one call on one machine.

    python -m benchmarks.peers [--shapes=dense,mixture,long] [--only=pytorch,trl,tunix,tunix-grpo]
        [--rounds=5] [--workdir=runs/peers] [--skip_install] [--skip_warmup] [--output=FILE.json]

All contenders get the same weights, tokens, lengths, optimizer and number of updates, in float32 on all
cores, and no response stops early. Each runs in its own process. The peers' environments have pinned
versions (`contenders.ENVIRONMENTS`), which pip installs into the workdir once. The kinds of work:

    sample          responses with the logprobs of their tokens
    sample_tokens   responses alone
    update          one optimizer update on given tokens: GRPO's clipped loss, AdamW, clip by global norm
    step            a whole RL step: sample, reward, update

In the warm-up, each contender tries the micro-batches of the shape and takes the smallest one within 5 %
of the fastest, and the first RL step is timed from the start of its process with an empty compilation
cache. Then the processes start again and work in turn (A B C A B C …), one at a time, in several rounds.
Ratios are paired by round. The table marks contenders whose logprobs, losses or samples differ from
ours, and has a row for those that cannot be installed or run. The output file keeps the results of
shapes that this call leaves out.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # Before JAX is imported; the workers get it, too.

import numpy as np
from absl import app, flags

from benchmarks.common import OUTPUT, machine, write_results
from benchmarks.peers import figures
from benchmarks.peers.contenders import CONTENDERS, Contender, install
from benchmarks.peers.prepare import prepare
from benchmarks.peers.protocol import ROOT, Worker, WorkerFailed
from benchmarks.peers.work import SHAPES
from drpo_jax.storage import path_of

SHAPE_NAMES = flags.DEFINE_list("shapes", list(SHAPES), f"Of {', '.join(SHAPES)}.")
PEERS = [name for name, contender in CONTENDERS.items() if not contender.ours]
ONLY = flags.DEFINE_list("only", PEERS, f"Peers to run: of {', '.join(PEERS)}.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds.", lower_bound=1)
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/peers", "Directory of the environments, logs and caches; kept and reused."
)
SKIP_INSTALL = flags.DEFINE_bool("skip_install", False, "Use the environments as they are.")
SKIP_WARMUP = flags.DEFINE_bool(
    "skip_warmup",
    False,
    "Reuse what the warm-ups of earlier calls have stored in the workdir, interrupted ones included.",
)
LIMIT = flags.DEFINE_float("limit", 600, "Seconds after which a worker has failed.")
flags.set_default(OUTPUT, "benchmarks/results/peers.json")

WARMUP = "settings", "tried", "start"  # The results of a warm-up.
UNTIMED = 2  # Calls before the first round; they may compile.
# Equal trials differ by up to 5 %. Of settings this close to the fastest, the smallest micro-batch wins.
NEAR = 1.05
COMPILATION = 60.0  # Seconds of the first update; settings that need more are not chosen.
PAUSE = 0.3  # Seconds between calls, in which the threads of the last one stop spinning.


class Match:
    """The contenders of one shape, and their results.

    Args:
      name: name of the shape.
      contenders: who takes part.
      workdir: absolute path of the workdir.
      failed: reasons why environments cannot be used.
    """

    def __init__(
        self, name: str, contenders: Sequence[Contender], workdir: Path, failed: dict[str, str]
    ):
        self.name, self.shape, self._workdir = name, SHAPES[name], workdir
        self._directory, self._contenders = workdir / name, contenders
        self._stored = self._directory / "warmup.json"
        self._workers: dict[str, Worker] = {}
        self.entries: dict[str, dict[str, Any]] = {
            c.name: {"title": c.title, "ours": c.ours, "works": c.works, "asked": c.asked}
            | ({"failed": failed[c.environment]} if c.environment in failed else {})
            for c in contenders
        }

    def run(self, rounds: int, skip_warmup: bool) -> dict[str, Any]:
        """Returns the results of the shape, see `figures`; stops all workers, even if interrupted."""
        try:
            return self._run(rounds, skip_warmup)
        finally:
            for worker in self._workers.values():
                worker.stop()

    def _run(self, rounds: int, skip_warmup: bool) -> dict[str, Any]:
        prepare(self.shape, self._directory)
        if skip_warmup and self._stored.exists():
            for name, stored in json.loads(self._stored.read_text()).items():
                if name in self.entries:
                    self.entries[name] |= stored
        for contender in self._able():
            with self._excluded_if_failing(contender):
                self._warm_up(contender)
        for contender in self._able():
            with self._excluded_if_failing(contender):
                self._start(contender)
        for number in range(-UNTIMED, rounds):
            self._round(number)
        self._compare()
        return {
            "shape": dataclasses.asdict(self.shape),
            "tokens": {work: self.shape.tokens(work) for work in figures.WORKS},
            "rounds": rounds,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine() | {"cpu": _cpu()},
            "contenders": self.entries,
        }

    def _able(self) -> list[Contender]:
        return [c for c in self._contenders if "failed" not in self.entries[c.name]]

    @contextlib.contextmanager
    def _excluded_if_failing(self, contender: Contender) -> Iterator[None]:
        """A failure inside takes the contender out and becomes its result."""
        try:
            yield
        except WorkerFailed as error:
            print(f"{self.name}: {contender.title}: {error}", flush=True)
            self.entries[contender.name]["failed"] = _reason(error)
            if worker := self._workers.pop(contender.name, None):
                worker.stop()

    def _launch(self, contender: Contender, settings: dict[str, Any]) -> dict[str, Any]:
        """Starts a worker, waits for its model, and returns its first reply."""
        self._workers[contender.name] = contender.start(
            self.shape, self._directory, self._workdir, settings, LIMIT.value
        )
        return self._workers[contender.name].reply()

    def _warm_up(self, contender: Contender) -> None:
        """Finds the settings of a contender, and measures the cold start of one that makes steps.

        Whatever the entry already has is not measured again.
        """
        entry = self.entries[contender.name]
        if "settings" not in entry:
            if contender.tuned_as:
                tuned = self.entries[contender.tuned_as]
                if "settings" not in tuned:
                    raise WorkerFailed(f"{tuned['title']} failed, which finds the settings")
                entry["settings"] = tuned["settings"]
            else:
                self._tune(contender)
        if "step" in contender.works and "start" not in entry:
            shutil.rmtree(contender.cache(self._directory), ignore_errors=True)
            self._launch(contender, entry["settings"])
            worker = self._workers[contender.name]
            worker.ask("step")
            entry["start"] = {"cold": time.perf_counter() - worker.started}
            worker.stop()
        self._store()

    def _store(self) -> None:
        """Writes the results of the warm-ups, with those that earlier calls have stored."""
        stored = json.loads(self._stored.read_text()) if self._stored.exists() else {}
        for contender, entry in self.entries.items():
            results = {key: entry[key] for key in WARMUP if key in entry}
            stored |= {contender: results} if results else {}
        self._stored.write_text(json.dumps(stored, indent=2) + "\n")

    def _tune(self, contender: Contender) -> None:
        """Finds the best settings, one setting after the other, each trial in a new process."""
        entry = self.entries[contender.name]
        tried, problem = entry.setdefault("tried", []), None
        choices = contender.choices(self.shape)
        best = {name: values[0] for name, values in choices.items()}
        best["micro_batch"] = self.shape.micro_batches[1]
        for name, values in choices.items():
            for settings in [best | {name: value} for value in values]:
                if settings in [done for done, _ in tried]:
                    continue
                try:
                    seconds = self._update_seconds(contender, settings)
                except WorkerFailed as error:  # Other settings may need less memory or time.
                    print(f"{self.name}: {contender.title}: {error}", flush=True)
                    problem = error
                    continue
                tried.append([settings, seconds])
                self._store()
                shown = ", ".join(f"{key} {value}" for key, value in settings.items())
                print(
                    f"{self.name}: {contender.title}: {shown}: update {seconds:.2f} s", flush=True
                )
            if tried:
                limit = NEAR * min(seconds for _, seconds in tried)
                near = [pair for pair in tried if pair[1] <= limit]
                best = min(near, key=lambda pair: (pair[0]["micro_batch"], pair[1]))[0]
        if problem and not tried:
            raise problem
        entry["settings"] = best

    def _update_seconds(self, contender: Contender, settings: dict[str, Any]) -> float:
        """Returns the seconds of an update in a new process, without compilation.

        Raises:
          WorkerFailed: the worker fails, or its first update takes longer than `COMPILATION`.
        """
        self._launch(contender, settings)
        worker = self._workers[contender.name]
        first = worker.ask("update")["seconds"]
        if first > COMPILATION:
            worker.stop()
            raise WorkerFailed(f"{settings}: the first update takes {first:.0f} s")
        seconds = min(worker.ask("update")["seconds"] for _ in range(3))
        worker.stop()
        return seconds

    def _start(self, contender: Contender) -> None:
        """Starts the worker that the rounds measure; the first calls are kept for the comparison."""
        entry = self.entries[contender.name]
        ready = self._launch(contender, entry["settings"])
        worker = self._workers[contender.name]
        entry |= {"versions": ready["versions"], "idle": ready["rss"], "seconds": {}, "replies": {}}
        if "step" in contender.works:
            reply = worker.ask("step")
            entry.setdefault("start", {})["warm"] = time.perf_counter() - worker.started
            entry["replies"]["step"] = [_numbers(reply)]
        else:
            entry["scores"] = worker.ask("score")["logp"]

    def _round(self, number: int) -> None:
        """Runs every kind of work once in every contender, in turn; timed unless number < 0."""
        for work in figures.WORKS:
            for contender in self._able():
                if work not in contender.works:
                    continue
                entry = self.entries[contender.name]
                time.sleep(PAUSE)
                with self._excluded_if_failing(contender):
                    reply = self._workers[contender.name].ask(work)
                    entry["peak"] = reply["peak"]
                    if number < 0:
                        entry["replies"].setdefault(work, []).append(_numbers(reply))
                    else:
                        entry["seconds"].setdefault(work, []).append(reply["seconds"])

    def _compare(self) -> None:
        """Marks the contenders whose numbers differ from ours."""
        tokens = {work: self.shape.sequences * self.shape.response for work in figures.WORKS}
        scores = {name: entry.pop("scores", None) for name, entry in self.entries.items()}
        own = {tuple(e["works"]): e for e in self.entries.values() if e["ours"]}
        for name, entry in self.entries.items():
            if scores[name] is not None and scores.get("ours") is not None:
                deviation = np.abs(np.array(scores[name]) - np.array(scores["ours"])).max()
                entry["logp"] = float(deviation)
            entry["differs"] = figures.differences(entry, own[tuple(entry["works"])], tokens)


def _reason(error: WorkerFailed) -> str:
    """Returns why a worker failed, without the path of the log, which says nothing on other machines."""
    return str(error).partition("; see ")[0]


def _numbers(reply: dict[str, Any]) -> dict[str, Any]:
    """Returns what the work itself returned."""
    return {k: v for k, v in reply.items() if k not in ("seconds", "rss", "peak")}


def _cpu() -> str:
    """Returns the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_seconds(repeats: int = 3) -> dict[str, float]:
    """Returns the median seconds of `import drpo_jax` and of --help, in processes of their own."""
    commands = {
        "import drpo_jax": ["-c", "import drpo_jax"],
        "drpo --help": ["-m", "drpo_jax", "--help"],
        "drpo train --help": ["-m", "drpo_jax", "train", "--help"],
    }
    medians = {}
    with tempfile.TemporaryDirectory() as bytecode:
        # An installed package has its bytecode, whatever PYTHONDONTWRITEBYTECODE says here.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
        for name, arguments in commands.items():
            seconds = []
            for _ in range(1 + repeats):  # The first run compiles.
                started = time.perf_counter()
                command = [sys.executable, *arguments]
                subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True
                )
                seconds.append(time.perf_counter() - started)
            medians[name] = round(statistics.median(seconds[1:]), 3)
    return medians


def main(_: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Stops the workers.
    for flag, known in ((SHAPE_NAMES, SHAPES), (ONLY, PEERS)):
        if unknown := set(flag.value) - set(known):
            sys.exit(f"error: --{flag.name}={', '.join(unknown)}: choose from {', '.join(known)}")
    workdir = Path(os.path.abspath(path_of(WORKDIR.value)))
    chosen = {*ONLY.value, *(CONTENDERS[name].tuned_as for name in ONLY.value)}
    contenders = [c for c in CONTENDERS.values() if c.ours or c.name in chosen]
    failed = {}
    for environment in {c.environment for c in contenders if c.environment}:
        try:
            if not SKIP_INSTALL.value:
                install(environment, workdir)
        except WorkerFailed as error:
            print(error, flush=True)
            failed[environment] = _reason(error)
    results = {"shapes": _stored_shapes(), "commands": command_seconds()}
    for name in SHAPE_NAMES.value:
        results["shapes"][name] = Match(name, contenders, workdir, failed).run(
            ROUNDS.value, SKIP_WARMUP.value
        )
        if OUTPUT.value:
            command = "python -m " + " ".join(["benchmarks.peers", *sys.argv[1:]])
            write_results(OUTPUT.value, command, results)
    print(
        figures.markdown(results | {"shapes": {n: results["shapes"][n] for n in SHAPE_NAMES.value}})
    )


def _stored_shapes() -> dict[str, Any]:
    """Returns the results of the output so far, which this call adds to."""
    file = path_of(OUTPUT.value) if OUTPUT.value else None
    return json.loads(file.read_text())["figures"]["shapes"] if file and file.exists() else {}


if __name__ == "__main__":
    app.run(main)
