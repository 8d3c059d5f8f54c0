#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster created by xpk (pip install xpk).
#   bash launch/gke/xpk.sh --name=NAME --cluster=CLUSTER --type=TYPE --image=IMAGE [FLAG ...] -- COMMAND ...
#   bash launch/gke/xpk.sh --name=drpo --cluster=pods --type=v5p-128 --image=IMAGE -- \
#       python -m drpo_jax train --config=configs/qwen3_30b_a3b.py:boundary --workdir=gs://BUCKET/run
#   --name=NAME        name of the workload                               (or NAME)
#   --cluster=CLUSTER  cluster, as named to `xpk cluster create`          (or CLUSTER)
#   --type=TYPE        TPU type, such as v6e-64 or v5litepod-16           (or TPU_TYPE)
#   --image=IMAGE      image built from launch/gke/Dockerfile             (or IMAGE)
#   --zone=ZONE        zone (default: the one set in gcloud)              (or ZONE)
#   --project=PROJECT  project (default: the one set in gcloud)           (or PROJECT)
#   --restarts=N       restarts after failures and preemptions (default: 50)
#   --dry-run          print the command instead of running it
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/../help.sh"

fail() {
  echo "error: $*" >&2
  exit 2
}

name="${NAME:-}" cluster="${CLUSTER:-}" type="${TPU_TYPE:-}" image="${IMAGE:-}" restarts=50
zone="${ZONE:-}" project="${PROJECT:-}" dry_run=""
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --cluster=*) cluster="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1: unknown flag; --help lists the flags, and -- precedes the command" ;;
  esac
  shift
done
(($#)) || fail "give the command after --, for example: -- python -m drpo_jax train --config=…"
[[ -n "$name" && -n "$cluster" && -n "$type" && -n "$image" ]] ||
  fail "give --name, --cluster, --type and --image (--help explains them)"

# xpk restarts a workload that a signal killed. A run that SIGTERM stopped exits with status 75 once it is
# saved; a process that lost its peers exits with status 1.
create=(xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$type"
  "--docker-image=$image" "--max-restarts=$restarts" "--restart-on-exit-codes=1,75")
if [[ -n "$zone" ]]; then create+=("--zone=$zone"); fi
if [[ -n "$project" ]]; then create+=("--project=$project"); fi
create+=("--command=$(printf '%q ' "$@")")
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${create[@]}"
  echo
else
  "${create[@]}"
fi
