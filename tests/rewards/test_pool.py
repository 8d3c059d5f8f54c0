"""Worker processes: order of results, limits, replacement of dead workers, and a clean end."""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import drpo_jax.rewards.pool
from drpo_jax.errors import TrainingStopped
from drpo_jax.rewards import REWARDS, Isolated, Reward, Verdict, submit
from drpo_jax.rewards.pool import Pool

CPU_SECONDS, WALL_SECONDS = 0.4, 1.5

MODULE = '''
import os, signal, sys, time

def act(what, argument):
    """The calls of these tests, which the workers import."""
    if what == "number":
        return float(argument)
    if what == "loaded":
        return argument in sys.modules
    if what == "pid":
        return os.getpid()
    if what == "parent":
        return os.getppid()
    if what == "count":  # CPU time in C code, where no Python signal handler would run
        return 3 ** int(argument) % 2
    if what == "loop":
        while True:
            pass
    if what == "sleep":
        time.sleep(float(argument))
        return 1.0
    if what == "allocate":
        return len(bytes(int(float(argument)))) > 0
    if what == "nest":
        return act("nest", argument)
    if what == "once":  # killed from outside, the first time
        if not os.path.exists(argument):
            open(argument, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0
    if what == "text":
        return argument
    if what == "nothing":
        return None
    if what == "leave":
        sys.exit(0)
    if what == "kill":
        os.kill(os.getpid(), int(argument))
    if what == "exit":
        os._exit(int(argument))
    if what == "length":
        print("the output of a worker is discarded")
        return len(argument)
    raise ValueError(f"cannot {what}")
'''


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    """A function that this process has imported and that workers can import."""
    folder = tmp_path_factory.mktemp("acts")
    (folder / "pool_acts.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import pool_acts

    yield pool_acts.act
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(act):
    with Pool(act, workers=2, cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS) as pool:
        pool.submit([("number", "0")]).result()
        yield pool


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=20):
    stop = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < stop:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_results_are_in_order(pool):
    numbers = np.random.default_rng(0).integers(0, 50, 400)
    pending = pool.submit([("number", str(n)) for n in numbers])
    result = pending.result()
    assert result.dtype == np.float32 and result.tolist() == numbers.tolist()
    assert pending.done() and pool.submit([]).result().shape == (0,)


def test_batches_overlap_with_other_work_and_each_other(pool):
    slow = pool.submit([("sleep", "0.51")])
    assert not slow.done()
    assert pool.submit([("number", "5.5")]).result() == [5.5]  # by the other worker
    assert slow.result() == [1.0]


@pytest.mark.parametrize("module, loaded", [("jax", 0), ("sympy", 0), ("drpo_jax.rewards", 1)])
def test_workers_are_clean_interpreters(pool, module, loaded):
    assert pool.submit([("loaded", module)]).result() == [loaded]


@pytest.mark.parametrize(
    "call", [("loop", ""), ("count", "100000000"), ("allocate", "3e9"), ("nest", "")]
)
def test_limits_of_time_and_memory(pool, call):
    start = time.monotonic()
    assert pool.submit([call, ("number", "3")]).verdicts() == [
        Verdict(0.0, limited=True),
        Verdict(3.0),
    ]
    assert time.monotonic() - start < 20


def test_limit_is_cpu_time(pool):
    """A call may wait for longer than its CPU time, because the machine may be busy."""
    assert pool.submit([("sleep", str(2 * CPU_SECONDS))]).result() == [1.0]


def test_a_stuck_worker_is_killed_and_replaced(pool):
    before = {process.process.pid for process in pool._processes}
    start = time.monotonic()
    (verdict,) = pool.submit([("sleep", "1000")]).verdicts()
    assert verdict == Verdict(0.0, lost=True, retries=1)
    assert WALL_SECONDS <= time.monotonic() - start < 30  # both attempts
    after = {process.process.pid for process in pool._processes}
    assert len(before - after) == 1 and wait_until_gone(before - after)
    assert pool.submit([("number", str(n)) for n in range(9)]).result().tolist() == [*range(9)]


@pytest.mark.parametrize("call", [("kill", "11"), ("kill", "9"), ("exit", "0"), ("exit", "3")])
def test_a_worker_that_dies_is_replaced(pool, call):
    lost, right = pool.submit([call, ("number", "7")]).verdicts()
    assert lost == Verdict(0.0, lost=True, retries=2) and right == Verdict(7.0)


def test_a_worker_killed_from_outside_changes_no_result(pool, tmp_path):
    (verdict,) = pool.submit([("once", str(tmp_path / "seen"))]).verdicts()
    assert verdict == Verdict(1.0, retries=1)


def test_a_child_killed_between_calls_changes_no_result(act):
    """The message about its end must not be read as the answer to the next call."""
    with Pool(act, workers=1) as pool:
        for round in range(3):
            child = int(pool.submit([("pid", str(round))]).result()[0])
            os.kill(child, signal.SIGKILL)
            assert wait_until_gone([child])
            numbers = [str(100 * round + n) for n in range(40)]
            verdicts = pool.submit([("number", n) for n in numbers]).verdicts()
            assert [verdict.value for verdict in verdicts] == [float(n) for n in numbers]
            assert not any(verdict.lost for verdict in verdicts)


def test_children_killed_at_random_change_no_result(act):
    """Kills children and whole workers while 2,000 calls are made."""
    rng, stop = random.Random(0), threading.Event()
    with Pool(act, workers=2) as pool:
        pool.submit([("number", "-1")]).result()

        def kill():
            while not stop.wait(rng.uniform(0.001, 0.1)):
                for process in list(pool._processes):
                    try:
                        if rng.random() < 0.02:  # A start takes long on a busy machine.
                            os.killpg(process.process.pid, signal.SIGKILL)
                        else:
                            path = (
                                f"/proc/{process.process.pid}/task/{process.process.pid}/children"
                            )
                            with open(path) as children:
                                os.kill(int(rng.choice(children.read().split())), signal.SIGKILL)
                    except (OSError, IndexError):
                        pass

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            verdicts = pool.submit([("number", str(n)) for n in range(2000)]).verdicts()
        finally:
            stop.set()
            killer.join()
    assert [v.value for n, v in enumerate(verdicts) if not v.lost and v.value != n] == []
    assert sum(verdict.retries for verdict in verdicts) > 0


def test_a_pool_that_loses_calls_stops(act, monkeypatch):
    monkeypatch.setattr(drpo_jax.rewards.pool, "MAX_LOST", 2)
    with Pool(act, workers=1, wall_seconds=0.2) as pool:
        pending = pool.submit([("sleep", str(n)) for n in range(60, 90)])
        with pytest.raises(
            TrainingStopped, match=r"3 of 3 calls of pool_acts.act.*0.2 s.*'sleep', '62'"
        ):
            pending.result()


def test_a_stopped_worker_changes_no_result(act):
    """A call whose process gets no CPU until the wall-time limit is tried again in another one."""
    with Pool(act, workers=1, wall_seconds=1.0) as pool:
        template, child = pool.submit([("parent", ""), ("pid", "")]).result().astype(int)
        os.killpg(template, signal.SIGSTOP)
        assert pool.submit([("number", "8")]).result() == [8]
        assert wait_until_gone([template, child])


def test_a_limit_leaves_the_warm_process(pool):
    """A limit ends only the child; the worker with the imports continues."""
    before = {process.process.pid for process in pool._processes}
    assert pool.submit([("loop", "x"), ("loop", "y"), ("loop", "z")]).result().tolist() == [0] * 3
    assert before <= {process.process.pid for process in pool._processes}  # a second one may start


def test_the_caller_gets_the_error_of_the_function(pool):
    with pytest.raises(
        RuntimeError, match=r"(?s)act raised an error.*'fly'.*ValueError: cannot fly"
    ):
        pool.submit([("number", "1"), ("fly", "")]).result()
    with pytest.raises(RuntimeError, match="SystemExit: 0"):
        pool.submit([("leave", "")]).result()
    assert pool.submit([("number", "2")]).result() == [2]


@pytest.mark.parametrize(
    "value, shown",
    [(None, "None"), ("1", "'1'"), (math.nan, "nan"), (-math.inf, "-inf"), (1e38, r"1e\+38")]
    + [([1.0], r"\[1.0\]"), (np.ones(1), r"array\(\[1.\]\)"), (1j, "1j")],
)
def test_a_reward_is_a_finite_number(value, shown):
    with pytest.raises(RuntimeError, match=f"(?s)<lambda>.*'q', 'r', 'a'.*returned {shown}"):
        submit(lambda prompt, response, answer: value, ["q"], ["r"], ["a"])


@pytest.mark.parametrize("value", [1, 0.5, True, np.bool_(True), np.float16(2), np.array(3), -1e9])
def test_numbers_that_are_rewards(value):
    result = submit(lambda *texts: value, ["q"], ["r"], ["a"]).result()
    assert result.dtype == np.float32 and result == [np.float32(value)]


def test_a_reward_that_ends_the_process_is_an_error():
    with pytest.raises(RuntimeError, match="'r'"):
        submit(lambda *texts: sys.exit(0), ["q"], ["r"], ["a"])


@pytest.mark.parametrize(
    "call", [("nothing", ""), ("text", "1"), ("number", "nan"), ("number", "1e38")]
)
def test_a_reward_in_a_worker_is_a_finite_number(pool, call):
    with pytest.raises(RuntimeError, match=rf"(?s)'{call[0]}'.*must be a finite number"):
        pool.submit([call]).result()


def test_any_text_arrives(pool):
    texts = ["\x00", "\ud800", "x" * 3_000_000, "\n", "😀"]
    result = pool.submit([("length", text) for text in texts]).result()
    assert result.tolist() == [1, 1, 3_000_000, 1, 1]


def test_equal_calls_are_made_once(act):
    with Pool(act, workers=1) as pool:
        calls = [("pid", "a"), ("exit", "3"), ("pid", "a")]  # exit ends the child of the first call
        first = pool.submit(calls).result()
        assert first[0] == first[2] == pool.submit([("pid", "a")]).result()[0]
        assert pool.submit([("pid", "b")]).result()[0] != first[0]
        pool._cache_room = 0  # drops the oldest calls
        pool.submit([("number", "4")]).result()
        assert ("pid", "a") not in pool._cache and ("number", "4") in pool._cache
    with Pool(act, workers=1, cache=False) as pool:
        first = pool.submit(calls).result()
        assert first[0] != first[2]


def test_closing(act):
    pool = Pool(act, workers=2, wall_seconds=100)
    running = pool.submit(
        [("pid", ""), ("parent", ""), *[("sleep", str(n)) for n in range(60, 90)]]
    )
    pids = [int(running.values[i].result().value) for i in range(2)]
    pool.close()
    with pytest.raises(RuntimeError, match="closed before this call"):
        running.result()
    assert running.done() and wait_until_gone(pids)
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.submit([("number", "1")])
    Pool(act).close()  # never started


def test_workers_that_do_not_start(tmp_path, monkeypatch):
    """The caller gets their error and does not wait forever."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text(
        "import os\nif os.environ.get('PYTHONHASHSEED') == '0': import no_such_module\n"
        "def reward(*texts): return 1.0\n"
    )
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    import half_there

    with Pool(half_there.reward, workers=1) as pool:
        with pytest.raises(RuntimeError, match=r"(?s)did not start.*No module named 'no_such_mod"):
            pool.submit([("x",)]).result()


def test_functions_that_workers_cannot_import():
    with pytest.raises(ValueError, match="<lambda> runs in worker processes.*import it"):
        Pool(lambda text: 1.0)
    with pytest.raises(ValueError, match="top level of a module"):
        Isolated(test_closing.__class__(test_closing.__code__, {"__name__": "__main__"}, "main"))


@pytest.mark.parametrize("end", ["kill", "exit", "raise"])
def test_no_worker_outlives_the_process(act, tmp_path, end):
    """Workers end with the process however it ends; the script needs no `__name__ == "__main__"`."""
    ends = {"kill": "os.kill(os.getpid(), 9)", "exit": "sys.exit()", "raise": "1 / 0"}
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, sys
            sys.path.insert(0, {os.path.dirname(sys.modules["pool_acts"].__file__)!r})
            from pool_acts import act
            from drpo_jax.rewards.pool import Pool
            pool = Pool(act, workers=2)
            calls = [(what, str(i)) for i in range(3) for what in ("pid", "parent")]
            print(*map(int, pool.submit(calls).result()), flush=True)
            pool.submit([("sleep", "300"), ("loop", "")])
            {ends[end]}
        """)
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, cwd=os.getcwd(),
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) >= 2, done.stderr
    assert wait_until_gone(pids)


@pytest.mark.slow
def test_rewards_of_users(act):
    """`submit` takes plain functions, isolated ones and rows of the table."""

    def plain(prompt, response, answer):
        return float(response == answer)

    def quick(prompt, response, answer):
        return 0.5 if response == prompt else ("number", response)

    isolated = Isolated(act, quick=quick, workers=1)
    with isolated.pool:
        texts = (["p", "q", "r"], ["p", "2", "3"], ["2", "2", "2"])
        assert submit(isolated, *texts).result().tolist() == [0.5, 2, 3]
        assert isolated("p", "4", "") == 4.0 and type(isolated("p", "4", "")) is float
        assert submit(plain, *texts).result().tolist() == [0, 1, 0]
        assert submit(plain, *texts).done()
        with pytest.raises(ValueError):
            submit(isolated, ["p"], ["r", "s"], ["a"])
        assert submit(Reward(isolated), *texts).result().tolist() == [0.5, 2, 3]
        assert submit(Reward(plain), *texts).result().tolist() == [0, 1, 0]
    assert isinstance(REWARDS["math"].function, Isolated)
