"""Worker processes: order of results, limits, replacement of dead workers, and a clean end."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from drpo_jax.rewards import REWARDS, Isolated, Reward, submit
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
    assert pool.submit([call, ("number", "3")]).result().tolist() == [0, 3]
    assert time.monotonic() - start < 20


def test_limit_is_cpu_time(pool):
    """A call may wait for longer than its CPU time, because the machine may be busy."""
    assert pool.submit([("sleep", str(2 * CPU_SECONDS))]).result() == [1.0]


def test_a_stuck_worker_is_killed_and_replaced(pool):
    before = {process.process.pid for process in pool._processes}
    start = time.monotonic()
    assert pool.submit([("sleep", "1000")]).result() == [0.0]
    assert WALL_SECONDS <= time.monotonic() - start < 30  # both attempts
    after = {process.process.pid for process in pool._processes}
    assert len(before - after) == 1 and wait_until_gone(before - after)
    assert pool.submit([("number", str(n)) for n in range(9)]).result().tolist() == [*range(9)]


@pytest.mark.parametrize("call", [("kill", "11"), ("kill", "9"), ("exit", "0"), ("exit", "3")])
def test_a_worker_that_dies_is_replaced(pool, call):
    assert pool.submit([call, ("number", "7")]).result().tolist() == [0, 7]


def test_a_worker_killed_from_outside_changes_no_result(pool, tmp_path):
    assert pool.submit([("once", str(tmp_path / "seen"))]).result() == [1.0]


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
    with pytest.raises(RuntimeError, match=r"(?s)act raised an error.*ValueError: cannot fly"):
        pool.submit([("number", "1"), ("fly", "")]).result()
    assert pool.submit([("number", "2")]).result() == [2]


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
    pids = [int(running.values[i].result()) for i in range(2)]
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
