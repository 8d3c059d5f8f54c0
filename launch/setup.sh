# shellcheck shell=bash
# Sourced by the scripts: goes to the repository root and puts a virtual environment with drpo_jax and its
# requirements on the PATH. Run by itself, it only creates the environment.
#   bash launch/setup.sh
#   PYTHON   interpreter that creates the environment (default: python3; 3.11 or newer)
#   VENV     directory of the environment (default: .venv)
#   INSTALL  what pip installs into it (default: -r requirements.txt)

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  # shellcheck source=launch/help.sh
  source "$(dirname "$0")/help.sh"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

VENV="${VENV:-.venv}"
if [[ ! -x "$VENV/bin/pip" ]]; then
  PYTHON="${PYTHON:-python3}"
  if ! command -v "$PYTHON" >/dev/null; then
    echo "error: '$PYTHON' not found; name a Python interpreter, 3.11 or newer:" \
      "PYTHON=/path/to/python bash $0" >&2
    exit 2
  fi
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: '$PYTHON' is $("$PYTHON" --version 2>&1), but 3.11 or newer is required;" \
      "name one: PYTHON=/path/to/python bash $0" >&2
    exit 2
  fi
  echo "creating the virtual environment $VENV" >&2
  "$PYTHON" -m venv "$VENV"
fi
VENV="$(cd "$VENV" && pwd)"

# The stamp records everything that determines what pip installs.
read -r -a install <<<"${INSTALL:--r requirements.txt}"
stamp="$(printf "%s\n" "${install[*]}" && cat requirements.txt pyproject.toml)"
if [[ "$(cat "$VENV/installed.txt" 2>/dev/null)" != "$stamp" ]]; then
  echo "installing ${install[*]} into $VENV (takes a few minutes the first time)" >&2
  # Python compiles what it imports; to compile all packages now would take longer than to copy them.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "${install[@]}"
  printf '%s\n' "$stamp" >"$VENV/installed.txt"
fi

export VENV
export PATH="$VENV/bin:$PATH"
# Huge pages for malloc cause far fewer page faults in large buffers on the CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
