# shellcheck shell=bash
# Sourced by the scripts: goes to the repository root and puts a virtual environment with
# requirements.txt on the PATH.
#   PYTHON  interpreter that makes the environment (default: python3, 3.11 or newer)
#   VENV    where the environment is (default: .venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

VENV="${VENV:-.venv}"
if [[ ! -x "$VENV/bin/pip" ]]; then
  PYTHON="${PYTHON:-python3}"
  if ! command -v "$PYTHON" >/dev/null; then
    echo "error: there is no '$PYTHON'; name a Python of 3.11 or newer:" \
      "PYTHON=/path/to/python bash $0" >&2
    exit 2
  fi
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: '$PYTHON' is $("$PYTHON" --version 2>&1), and 3.11 or newer is needed;" \
      "name one: PYTHON=/path/to/python bash $0" >&2
    exit 2
  fi
  echo "making the virtual environment $VENV" >&2
  "$PYTHON" -m venv "$VENV"
fi
VENV="$(cd "$VENV" && pwd)"

# The stamp is a copy of the requirements that were installed.
if ! cmp -s requirements.txt "$VENV/installed.txt"; then
  echo "installing requirements.txt into $VENV (a few minutes, once)" >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$VENV/installed.txt"
fi

export VENV
export PATH="$VENV/bin:$PATH"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
# Huge pages for malloc: far fewer page faults in large float buffers on the CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
