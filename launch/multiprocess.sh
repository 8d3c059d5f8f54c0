#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine, each with its own virtual CPU devices.
#   bash launch/multiprocess.sh N [DEVICES] -- COMMAND [ARGUMENT ...]
#   bash launch/multiprocess.sh 2 4 -- python -m drpo_jax train --config=configs/tiny.py --workdir=runs/two
# Process 0 writes to the console, process i to LOGS/process_i.log. Ctrl-C ends all processes, and so does a
# process that fails; the exit status is that of the first one to fail.
#   N        number of processes
#   DEVICES  virtual CPU devices per process (default: 1)
#   LOGS     directory of the logs (default: .cache/multiprocess)
#   PYTHON, VENV, INSTALL: see launch/setup.sh
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

count="${1:-}" devices=1
if (($# > 1)) && [[ "$2" != -- ]]; then devices="$2"; shift; fi
if [[ ! "$count" =~ ^[1-9][0-9]*$ || ! "$devices" =~ ^[1-9][0-9]*$ || "${2:-}" != -- || $# -lt 3 ]]; then
  echo "error: give a number of processes, optionally a number of devices, and -- before the command:" >&2
  usage >&2
  exit 2
fi
shift 2

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
logs="${LOGS:-.cache/multiprocess}"
mkdir -p "$logs"
port="$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count" JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export PJRT_NPROC="${PJRT_NPROC:-64}" # Collectives in progress block one thread per device.

# Sends the signal $1 (0: none) to every process still running, and kills those that remain after 40 seconds,
# more than the default of checkpoint.grace_seconds.
end_all() {
  local deadline=$((SECONDS + 40)) pid
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.1; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}

set -m  # Gives each process a group of its own. Ctrl-C does not reach these groups: the trap passes it on.
pids=()
trap 'trap "" INT; end_all INT; exit 130' INT
trap 'trap "" TERM; end_all TERM; exit 75' TERM
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then
    JAX_PROCESS_ID=0 "$@" </dev/null &
  else
    JAX_PROCESS_ID=$i "$@" </dev/null >"$logs/process_$i.log" 2>&1 &
  fi
  pids+=($!)
done
if ((count > 1)); then echo "showing process 0 of $count; the others write to $logs/process_*.log" >&2; fi

running=$count
ended=()
while ((running)); do
  sleep 0.2
  for ((i = 0; i < count; i++)); do
    if [[ -n "${ended[i]:-}" ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${pids[i]}" 2>/dev/null || status=$?
    ended[i]=1 running=$((running - 1))
    if ((status == 75)); then # A signal stopped the run, whose processes save and end together.
      echo "process $i of $count was stopped by a signal; the same call resumes" >&2
      end_all 0
      exit 75
    fi
    if ((status)); then
      echo "error: process $i of $count failed with exit status $status; ending the others" >&2
      if ((i)); then tail -n 20 "$logs/process_$i.log" >&2; fi
      end_all TERM 2>/dev/null
      exit "$status"
    fi
  done
done
