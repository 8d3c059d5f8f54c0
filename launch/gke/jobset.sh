#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster with JobSet, as a job from launch/gke/jobset.yaml.
#   bash launch/gke/jobset.sh --name=NAME --tpu=TPU --topology=TOPOLOGY --image=IMAGE [FLAG ...] -- COMMAND ...
#   bash launch/gke/jobset.sh --name=drpo --tpu=v5p --topology=4x4x4 --spot --image=IMAGE -- \
#       python -m drpo_jax train --config=configs/qwen3_30b_a3b.py:boundary --workdir=gs://BUCKET/run
# When a pod fails or the slice is preempted, all pods restart, and the run resumes in its workdir.
#   --name=NAME             name of the JobSet, in lower case             (or NAME)
#   --tpu=TPU               v4, v5e, v5p, v6e or tpu7x                    (or TPU)
#   --topology=TOPOLOGY     topology of the slice, such as 4x4x4 or 8x8   (or TOPOLOGY)
#   --image=IMAGE           image built from launch/gke/Dockerfile        (or IMAGE)
#   --chips-per-host=N      chips per machine of the node pool (default: 4)
#   --spot                  use Spot nodes only
#   --restarts=N            restarts after failures and preemptions (default: 50)
#   --namespace=NAMESPACE   Kubernetes namespace (default: default)       (or NAMESPACE)
#   --service-account=NAME  Kubernetes service account that may write to the bucket (default: default)
#   --dry-run               print the manifest instead of applying it
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/../help.sh"

fail() {
  echo "error: $*" >&2
  exit 2
}

name="${NAME:-}" tpu="${TPU:-}" topology="${TOPOLOGY:-}" image="${IMAGE:-}"
namespace="${NAMESPACE:-default}" account=default chips=4 restarts=50 spot="" dry_run=""
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --tpu=*) tpu="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --chips-per-host=*) chips="${1#*=}" ;;
    --spot) spot=yes ;;
    --restarts=*) restarts="${1#*=}" ;;
    --namespace=*) namespace="${1#*=}" ;;
    --service-account=*) account="${1#*=}" ;;
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
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: lower-case letters, digits and -, at most 40 characters, starting with a letter"
[[ "$image" =~ ^[A-Za-z0-9._:/@-]+$ ]] || fail "--image=$image: give the image to run"
[[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  fail "--topology=$topology: must be like 4x4x4 (v4, v5p, tpu7x) or 8x8 (v5e, v6e)"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts=$restarts: must be a number"
[[ "$chips" =~ ^[1-9]$ ]] || fail "--chips-per-host=$chips: must be 1, 4 or 8, as in the machines of the node pool"
[[ "$namespace" =~ ^[-a-z0-9]+$ ]] || fail "--namespace=$namespace: not a valid Kubernetes name"
[[ "$account" =~ ^[-.a-z0-9]+$ ]] || fail "--service-account=$account: not a valid Kubernetes name"
case "$tpu" in
  v4) accelerator="tpu-v4-podslice" ;;
  v5e) accelerator="tpu-v5-lite-podslice" ;;
  v5p) accelerator="tpu-v5p-slice" ;;
  v6e) accelerator="tpu-v6e-slice" ;;
  tpu7x) accelerator="tpu7x" ;;
  *) fail "--tpu=$tpu: must be one of v4, v5e, v5p, v6e, tpu7x" ;;
esac
total=$((${topology//x/*}))
((total % chips == 0)) || fail "--topology=$topology: $total chips do not divide into hosts of $chips"

nodes="{cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology"
if [[ -n "$spot" ]]; then nodes+=', cloud.google.com/gke-spot: "true"'; fi
command=""
for argument in "$@"; do  # As JSON, which is valid YAML.
  argument="${argument//\\/\\\\}"
  argument="${argument//$'\n'/\\n}"
  [[ "$argument" != *[[:cntrl:]]* ]] || fail "the command contains a control character: $argument"
  command+="${command:+, }\"${argument//\"/\\\"}\""
done

manifest="$(cat "$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")"
manifest=${manifest//__NAME__/"$name"}
manifest=${manifest//__NAMESPACE__/"$namespace"}
manifest=${manifest//__RESTARTS__/"$restarts"}
manifest=${manifest//__HOSTS__/"$((total / chips))"}
manifest=${manifest//__SERVICE_ACCOUNT__/"$account"}
manifest=${manifest//__NODES__/"$nodes}"}
manifest=${manifest//__IMAGE__/"$image"}
manifest=${manifest//__CHIPS__/"$chips"}
manifest=${manifest//__COMMAND__/"[$command]"}  # Last: placeholders in the command stay.
if [[ -n "$dry_run" ]]; then
  printf '%s\n' "$manifest"
  exit
fi
# A JobSet is immutable: one that has ended is deleted first.
jobset=(jobset "$name" "--namespace=$namespace")
earlier="$(kubectl get "${jobset[@]}" --ignore-not-found \
  --output='jsonpath={.metadata.name}:{.status.terminalState}')"
case "$earlier" in
  "" | :) ;;
  "$name:") fail "the JobSet $name is running; kubectl delete ${jobset[*]} ends it" ;;
  *) kubectl delete "${jobset[@]}" ;;
esac
printf '%s\n' "$manifest" | kubectl apply --filename=-
echo "output of the first host: kubectl logs --namespace=$namespace --follow" \
  "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" >&2
