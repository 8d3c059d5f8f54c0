#!/usr/bin/env bash
# On one host of a TPU slice: installs, and runs one command at a time that outlives the connection.
# launch/tpu_vm.sh calls it on every host.
#   bash launch/tpu_host.sh install             the environment, with JAX for TPUs
#   bash launch/tpu_host.sh running COMMAND ... whether it is
#   bash launch/tpu_host.sh start COMMAND ...   in the background
#   bash launch/tpu_host.sh follow [LINES]      its output, to its end; exits with its status
#   bash launch/tpu_host.sh result              how it ended; its last lines if it failed
#   bash launch/tpu_host.sh stop
#   RUN   directory for its output, process id and exit status (default: .cache/run)
#   VENV  the environment (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="${RUN:-.cache/run}" venv="${VENV:-.venv}"
mkdir -p "$run"

alive() {
  [[ -f "$run/pid" && ! -f "$run/status" && "$(ps -o stat= -p "$(cat "$run/pid")")" == [!Z]* ]]
}

install() {
  if [[ ! -x "$venv/bin/pip" ]] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --quiet --user uv  # the image's Python is too old: uv brings its own
    python3 -m uv venv --quiet --seed --python 3.12 "$venv"
  fi
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  if ! cmp -s launch/requirements-tpu.txt "$VENV/installed-tpu.txt"; then
    python -m pip install --quiet --disable-pip-version-check \
      -r requirements.txt -r launch/requirements-tpu.txt
    cp launch/requirements-tpu.txt "$VENV/installed-tpu.txt"
  fi
}

running() {
  alive || return 1
  if [[ "$(cat "$run/command")" != "$(printf '%q ' "$@")" ]]; then
    echo "error: another command is running: $(cat "$run/command")(tpu_vm.sh --stop ends it)" >&2
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
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
  # shellcheck disable=SC2016  # expanded by the inner shell
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
  status="$(cat "$run/status" 2>/dev/null || echo 'none, it was killed')"
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
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
