"""Injects faults into a small run and checks its end: python -m benchmarks.faults

An uninterrupted run is the reference. Each trial starts the same run in a fresh directory, injects one
fault, repeats the command until it succeeds, and compares every metric (without times) and every bit of
the last checkpoint with the reference. Prints a table of fault, trials and outcomes. Exits with 1 if a
trial did not end like the reference.

Full and read-only disks need the right to mount a tmpfs. Without it, they are listed as not tried.
"""

import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags

from benchmarks.common import OUTPUT, write_results

ROOT = Path(__file__).parents[1]
CONFIG = "benchmarks/faults_config.py"
RUN = [sys.executable, "-m", "drpo_jax", "train", f"--config={CONFIG}"]
CLOCKS = ("time/", "compile/", "tokens_per_second", "reward/retries")
SAME = "as uninterrupted"
PATIENCE = 400  # Seconds; a process waits 330 s for a coordinator that does not answer.
STARTS = 6  # A trial that needs more starts than this has failed.
KILLS = flags.DEFINE_integer(
    "kills", 50, "Trials of SIGKILL at a random time; others in proportion."
)
JOBS = flags.DEFINE_integer("jobs", 2, "Concurrent trials; trials of two processes mostly wait.")
ONLY = flags.DEFINE_string(
    "only", "", "Only the faults whose name matches this regular expression."
)

PHASES = {
    "the warm start": "drpo_jax.loop.warm_start:demonstration_batch:3",
    "a save": "drpo_jax.checkpoint.Checkpoints:_seal:3",
    "a rollout": "drpo_jax.loop.collector.Collector:collect:4",
    "an update": "drpo_jax.programs.Programs:rollout_batch:6",
    "an evaluation": "drpo_jax.loop.loop:evaluate:2",
    "the time between a record and its checkpoint": "drpo_jax.metrics.log.MetricLogger:synchronize:6",
}


class Failed(Exception):
    """A trial did not end as it should; the message says how."""


def start(workdir: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """Starts the run in `workdir` in a process group of its own."""
    log = open(workdir.with_suffix(".log"), "a")
    return subprocess.Popen(
        [*RUN, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_two(workdir: Path) -> list[subprocess.Popen]:
    """Starts the run in two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(workdir, JAX_PROCESS_ID=str(number), **common) for number in range(2)]


def finish(workdir: Path, processes: int = 1) -> None:
    """Repeats the command until it ends with status 0."""
    for _ in range(STARTS):
        started = start_two(workdir) if processes == 2 else [start(workdir)]
        status = max(process.wait() for process in started)
        if status == 0:
            return
        if status in (2, 3):
            break
    raise Failed(f"exit status {status}: {last_line(workdir)}")


def last_line(workdir: Path) -> str:
    lines = workdir.with_suffix(".log").read_text().strip().splitlines()
    return lines[-1] if lines else ""


def outcome(workdir: Path) -> dict:
    """Everything that two equal runs share: records and the bytes of the last checkpoint's arrays."""
    program = (
        "import sys, json, hashlib, numpy as np, orbax.checkpoint as ocp\n"
        "reader = ocp.PyTreeCheckpointer()\n"
        "like = {k: ocp.RestoreArgs(np.ndarray) for k in reader.metadata(sys.argv[1])"
        ".item_metadata.tree}\n"
        "tree = reader.restore(sys.argv[1], restore_args=like)\n"
        "print(json.dumps({k: hashlib.sha256(np.asarray(v).tobytes()).hexdigest() "
        "for k, v in tree.items()}))"
    )
    steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()]
    last = max(steps, key=lambda path: int(path.name))
    command = [sys.executable, "-c", program, str(last / "default")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = {}
    for name in ("metrics.jsonl", "sft/metrics.jsonl"):
        lines = (workdir / name).read_text().splitlines()
        records[name] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(CLOCKS)}
            for line in lines
        ]
    return {"step": last.name, "arrays": json.loads(done.stdout.splitlines()[-1])} | records


class Faults:
    """The faults. Each method injects one into a fresh run and lets the run end.

    Args:
      directory: of the reference runs, which are made when they are first needed.
      jobs: number of concurrent trials, which slow each other down.
    """

    def __init__(self, directory: Path, jobs: int = 1):
        self.random = random.Random(0)
        self.directory, self.jobs, self.seconds = directory, jobs, 0.0
        self.lock = threading.Lock()

    @functools.cached_property
    def one(self) -> Path:
        """The uninterrupted run of one process; sets `seconds` to its duration."""
        workdir = self.directory / "one"
        finish(workdir)  # The first start compiles; the second one is timed.
        shutil.rmtree(workdir)
        started = time.monotonic()
        finish(workdir)
        self.seconds = time.monotonic() - started
        return workdir

    @functools.cached_property
    def two(self) -> Path:
        """The uninterrupted run of two processes."""
        finish(workdir := self.directory / "two", processes=2)
        return workdir

    @property
    def half(self) -> Path:
        """The run that SIGTERM stopped after step 5; concurrent trials share it."""
        with self.lock:
            return self._half

    @functools.cached_property
    def _half(self) -> Path:
        workdir = self.directory / "half"
        status = start(workdir, FAULT="drpo_jax.loop.collector.Collector:collect:5:SIGTERM").wait()
        if status != 75:
            raise Failed(f"exit status {status} after SIGTERM in step 5: {last_line(workdir)}")
        return workdir

    def check(self, workdir: Path, reference: Path) -> None:
        """Compares the end of a run with that of the uninterrupted one."""
        result, expected = outcome(workdir), outcome(reference)
        if different := [name for name in expected if result[name] != expected[name]]:
            raise Failed(f"other {', '.join(different)} than the uninterrupted run")

    def copy(self, workdir: Path) -> Path:
        """Copies the half-finished run into `workdir`; returns its last checkpoint."""
        shutil.copytree(self.half, workdir)
        return workdir / "checkpoints" / "5"

    def files(self, workdir: Path) -> list[Path]:
        """Copies the half-finished run into `workdir`; returns the files of its last checkpoint."""
        return sorted(path for path in self.copy(workdir).rglob("*") if path.is_file())

    def wait(self, process: subprocess.Popen) -> bool:
        """Waits for a random part of the run's duration; False if it ended meanwhile."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0, self.seconds * self.jobs))
        return process.poll() is None

    def kill(self, workdir: Path) -> None:
        while not self.wait(process := start(workdir)):
            shutil.rmtree(workdir)  # The run finished before the kill.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finish(workdir)

    def terminate(self, workdir: Path) -> None:
        process = start(workdir)
        time.sleep(8)  # Python and JAX are imported, and the handler is installed.
        if self.wait(process):
            process.send_signal(signal.SIGTERM)
        # Without a handler yet, there is nothing to save.
        if (status := process.wait()) not in (0, 75, -signal.SIGTERM):
            raise Failed(f"exit status {status} after SIGTERM")
        finish(workdir)

    def kill_in(self, phase: str) -> Callable[[Path], None]:
        def inject(workdir: Path) -> None:
            if (status := start(workdir, FAULT=PHASES[phase]).wait()) != -signal.SIGKILL:
                raise Failed(f"the fault was not injected: exit status {status}")
            finish(workdir)

        return inject

    def kill_workers(self, workdir: Path) -> None:
        """Kills children of the verifier's workers at random until the run ends."""
        process = start(workdir)
        while process.poll() is None:
            time.sleep(self.random.uniform(0, 0.3))
            workers = descendants(process.pid)
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(workers), signal.SIGKILL)
        if process.returncode:
            raise Failed(f"exit status {process.returncode}: {last_line(workdir)}")

    def flip(self, workdir: Path) -> None:
        """Flips one bit in a random file of the last checkpoint, larger files more often."""
        files = self.files(workdir)
        self._flip(self.random.choices(files, [file.stat().st_size for file in files])[0])
        finish(workdir)

    def flip_any(self, workdir: Path) -> None:
        """Flips one bit in a random file of the last checkpoint, all files equally often."""
        self._flip(
            self.random.choice([file for file in self.files(workdir) if file.stat().st_size])
        )
        finish(workdir)

    def _flip(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)

    def truncate(self, workdir: Path) -> None:
        file = self.random.choice(self.files(workdir))
        os.truncate(file, self.random.randrange(file.stat().st_size + 1) // 2)
        finish(workdir)

    def remove(self, workdir: Path) -> None:
        self.random.choice(self.files(workdir)).unlink()
        finish(workdir)

    def empty(self, workdir: Path) -> None:
        checkpoint = self.copy(workdir)
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        finish(workdir)

    def two_starts(self, workdir: Path) -> None:
        first, second = start(workdir), start(workdir)
        statuses = sorted([first.wait(), second.wait()])
        if statuses != [0, 2]:
            raise Failed(f"exit statuses {statuses} of two starts at once")

    def clock_set_back(self, workdir: Path) -> None:
        """The clock of a resumed run is a day behind that of its files."""
        self.copy(workdir)
        ahead = time.time() + 86400
        for path in workdir.rglob("*"):
            os.utime(path, (ahead, ahead))
        finish(workdir)

    def kill_process(self, number: int) -> Callable[[Path], None]:
        """Kills one of two processes; the other one has to end, too."""

        def inject(workdir: Path) -> None:
            processes = start_two(workdir)
            if self.wait(processes[number]):
                os.killpg(processes[number].pid, signal.SIGKILL)
            for process in processes:
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise Failed(f"the other process still runs after {PATIENCE} s") from None
            finish(workdir, processes=2)

        return inject

    def full_disk(self, workdir: Path) -> None:
        """A disk without room for the next checkpoint; then there is room."""
        with tmpfs(workdir, "64m"):
            shutil.copytree(self.half, workdir, dirs_exist_ok=True)
            ballast = workdir / "ballast"
            free = shutil.disk_usage(workdir).free
            ballast.write_bytes(bytes(max(free - 60_000, 0)))
            status = start(workdir).wait()
            if status != 3 or "no space left" not in last_line(workdir):
                raise Failed(f"exit status {status} on a full disk: {last_line(workdir)}")
            ballast.unlink()
            finish(workdir)
            self.check(workdir, self.one)

    def read_only(self, workdir: Path) -> None:
        with tmpfs(workdir, "64m"):
            shutil.copytree(self.half, workdir, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(workdir)], check=True)
            if (status := start(workdir).wait()) != 2:
                raise Failed(f"exit status {status} on a read-only disk: {last_line(workdir)}")
            subprocess.run(["mount", "-o", "remount,rw", str(workdir)], check=True)
            finish(workdir)
            self.check(workdir, self.one)


def descendants(pid: int) -> list[int]:
    """Returns the process ids of grandchildren: the processes in which verifiers make their calls."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            path = Path(f"/proc/{child}/task/{child}/children")
            found += [int(grandchild) for grandchild in path.read_text().split()]
    return found


@contextlib.contextmanager
def tmpfs(directory: Path, size: str) -> Iterator[None]:
    """Mounts a small disk at `directory`."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def trials(faults: Faults, kills: int) -> dict[str, tuple[int, Callable[[Path], None], str]]:
    """Returns {fault: (trials, function, reference to compare with)}; "": the function compares."""
    tenth = max(kills // 10, 1)
    rows: dict[str, tuple[int, Callable[[Path], None], str]] = {
        "SIGKILL at a random time": (kills, faults.kill, "one"),
        "SIGTERM at a random time": (2 * tenth, faults.terminate, "one"),
    }
    for phase in PHASES:
        rows[f"SIGKILL in {phase}"] = (1, faults.kill_in(phase), "one")
    return rows | {
        "SIGKILL of process 0 of two": (tenth, faults.kill_process(0), "two"),
        "SIGKILL of process 1 of two": (tenth, faults.kill_process(1), "two"),
        "verifier processes killed at random": (tenth, faults.kill_workers, "one"),
        "a bit flipped in the last checkpoint": (2 * tenth, faults.flip, "one"),
        "a bit flipped in one of its small files": (3 * tenth, faults.flip_any, "one"),
        "a file of the last checkpoint truncated": (tenth, faults.truncate, "one"),
        "a file of the last checkpoint missing": (tenth, faults.remove, "one"),
        "the last checkpoint empty": (1, faults.empty, "one"),
        "two starts at once": (tenth, faults.two_starts, "one"),
        "clock set back by a day": (1, faults.clock_set_back, "one"),
        "full disk": (1, faults.full_disk, ""),
        "read-only disk": (1, faults.read_only, ""),
    }


def trial(faults: Faults, inject: Callable[[Path], None], reference: str, workdir: Path) -> str:
    """Runs one trial in `workdir` and returns its outcome."""
    try:
        inject(workdir)
        if reference:
            faults.check(workdir, getattr(faults, reference))
        return SAME
    except Failed as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return f"not tried: {error.cmd[0]} exits with status {error.returncode}"
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def run(faults: Faults, kills: int, only: str = "") -> dict[str, collections.Counter]:
    """Runs the trials of the faults whose names match `only`; returns {fault: {outcome: trials}}."""
    rows = {name: row for name, row in trials(faults, kills).items() if re.search(only, name)}
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in rows}
    for reference in {row[2] or "one" for row in rows.values()}:
        getattr(faults, reference)  # The trials share the reference runs.
    with concurrent.futures.ThreadPoolExecutor(faults.jobs) as pool:
        started = {}
        for number in range(max((row[0] for row in rows.values()), default=0)):
            for place, (name, (count, inject, reference)) in enumerate(rows.items()):
                if number < count:
                    workdir = faults.directory / f"{place}_{number}"
                    started[pool.submit(trial, faults, inject, reference, workdir)] = name
        for future in concurrent.futures.as_completed(started):
            name, result = started[future], future.result()
            counts[name][result] += 1
            print(f"{name}: {counts[name].total()} of {rows[name][0]}: {result}", flush=True)
    return counts


def main(_: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        counts = run(Faults(Path(scratch), JOBS.value), KILLS.value, ONLY.value)
    print(f"\n{'fault':45} {'trials':>6}  outcomes")
    for name, results in counts.items():
        text = "; ".join(f"{count} {result}" for result, count in results.most_common())
        print(f"{name:45} {results.total():6}  {text}")
    if OUTPUT.value:
        write_results(OUTPUT.value, f"python -m benchmarks.faults --kills={KILLS.value}", counts)
    good = (SAME, "not tried")
    return int(
        not all(result.startswith(good) for results in counts.values() for result in results)
    )


if __name__ == "__main__":
    app.run(main)
