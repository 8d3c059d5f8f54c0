#!/usr/bin/env bash
# Sets up one host of a TPU slice, and runs one command there that outlives the connection.
# launch/tpu_vm.sh calls it on every host; on a single-host TPU VM, `install` and then `drpo train` are enough.
#   bash launch/tpu_host.sh install              create the environment, with JAX for TPUs
#   bash launch/tpu_host.sh start COMMAND ...    start the command in the background
#   bash launch/tpu_host.sh running COMMAND ...  succeed if this command is running
#   bash launch/tpu_host.sh follow [LINES]       show its output until it ends; exit with its status
#   bash launch/tpu_host.sh result               print how it ended, with its last lines if it failed
#   bash launch/tpu_host.sh stop                 end it
#   RUN   directory of its output, process id and exit status (default: .cache/run)
#   VENV  directory of the environment (default: .venv)
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="${RUN:-.cache/run}" venv="${VENV:-.venv}"
mkdir -p "$run"

alive() {
  [[ -f "$run/pid" && ! -f "$run/status" && "$(ps -o stat= -p "$(cat "$run/pid")")" == [!Z]* ]]
}

install() {
  if [[ ! -x "$venv/bin/pip" ]] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --quiet --user uv  # The image's Python is too old; uv brings its own.
    python3 -m uv venv --quiet --seed --python 3.12 "$venv"
  fi
  export INSTALL="-e .[tpu]"
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
}

running() {
  alive || return 1
  if [[ "$(cat "$run/command")" != "$(printf '%q ' "$@")" ]]; then
    echo "error: another command is running: $(cat "$run/command")(end it with tpu_vm.sh --stop)" >&2
    return 2
  fi
}

start() {
  rm -f "$run/status"
  printf '%q ' "$@" >"$run/command"
  if [[ -d "$venv" ]]; then
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
    export PATH
  fi
  # shellcheck disable=SC2016  # The inner shell expands it.
  setsid bash -c '"${@:2}"; echo $? >"$1/status"' _ "$run" "$@" >"$run/output" 2>&1 </dev/null &
  echo $! >"$run/pid"
}

follow() {
  while alive; do sleep 1; done &
  tail -n "${1:-+1}" --pid=$! -F "$run/output" 2>/dev/null
  return "$(cat "$run/status" 2>/dev/null || echo 1)"
}

result() {
  local status
  status="$(cat "$run/status" 2>/dev/null || echo 'none (it was killed)')"
  echo "$(hostname): exit status $status"
  if [[ "$status" != 0 ]]; then tail -n 20 "$run/output"; fi
}

stop() {
  local seconds
  for ((seconds = 0; seconds < 30; seconds++)); do
    alive || return 0
    kill -- "-$(cat "$run/pid")"
    sleep 1
  done
  kill -KILL -- "-$(cat "$run/pid")"
}

case "${1:-}" in
  install | running | start | follow | result | stop) "$@" ;;
  *)
    usage >&2
    exit 2
    ;;
esac
