#!/usr/bin/env bash
# Runs a command on every host of a TPU slice of Cloud TPU VMs, requested as a queued resource.
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE [FLAG ...] -- COMMAND [ARGUMENT ...]
#   bash launch/tpu_vm.sh --name=drpo --zone=us-east5-a --type=v5p-128 --spot --restarts=20 -- \
#       python -m drpo_jax train --config=configs/qwen3_30b_a3b.py:boundary --workdir=gs://BUCKET/run
# Uses the slice of that name, or creates it and waits for it. Copies this directory (the files that git does
# not ignore), installs it, starts the command on all hosts, and shows the output of the first host. The command
# outlives the connection: Ctrl-C leaves it running, and the same call shows it again. After a preemption the
# same call creates a new slice, and the run resumes in its workdir. A workdir that is not on object storage is
# copied back from the first host.
#   --name=NAME          name of the queued resource and of its node        (or TPU_NAME)
#   --zone=ZONE          zone, such as us-east5-a                           (or ZONE)
#   --project=PROJECT    project (default: the one set in gcloud)           (or PROJECT)
#   --type=TYPE          accelerator type, such as v6e-64 or v5litepod-8    (or TPU_TYPE)
#   --runtime=VERSION    software version of the hosts (default: by type)   (or TPU_RUNTIME)
#   --spot               request Spot capacity, which is cheaper and may be preempted
#   --restarts=N         after a preemption, create the slice again and resume, at most N times (default: 0)
#   --create-flag=FLAG   additional flag for creating the slice, such as --reserved; may be repeated
#   --ssh-flag=FLAG      additional flag for gcloud's ssh and scp, such as --internal-ip; may be repeated
#   --delete             delete the slice once the command has ended
#   --stop               end the command on all hosts and do nothing else
#   --dry-run            print the commands instead of running them
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

name="${TPU_NAME:-}" zone="${ZONE:-}" project="${PROJECT:-}" type="${TPU_TYPE:-}"
runtime="${TPU_RUNTIME:-}" restarts=0 delete="" stop="" dry_run=""
create_flags=() ssh_flags=()
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --spot) create_flags+=(--spot) ;;
    --restarts=*) restarts="${1#*=}" ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
    --delete) delete=yes ;;
    --stop) stop=yes ;;
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
[[ -n "$name" && -n "$zone" ]] || fail "give --name=NAME and --zone=ZONE (--help explains)"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts=$restarts: must be a number"
if [[ -z "$stop" ]]; then
  (($#)) || fail "give the command after --, for example: -- python -m drpo_jax train --config=…"
  [[ -n "$type" ]] || fail "give --type=TYPE, such as v6e-64 (gcloud compute tpus accelerator-types list)"
fi
if [[ -z "$runtime" ]]; then
  case "$type" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    tpu7*) fail "--type=$type: not available as Cloud TPU VMs; use launch/gke" ;;
    "") ;;
    *) fail "--type=$type: give its --runtime=VERSION (gcloud compute tpus tpu-vm versions list)" ;;
  esac
fi
command="$(printf '%q ' "$@")"
workdir=""
for argument in "$@"; do
  if [[ "$argument" == --workdir=* ]]; then workdir="${argument#*=}"; fi
done

where=("--zone=$zone")
if [[ -n "$project" ]]; then where+=("--project=$project"); fi
queued=(gcloud compute tpus queued-resources)
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"})
scp=(gcloud compute tpus tpu-vm scp "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"})
host="bash drpo_jax/launch/tpu_host.sh"

run() {
  local word plain='^[A-Za-z0-9_./:=,@+-]+$'
  if [[ -z "$dry_run" ]]; then
    "$@"
    return
  fi
  for word in "$@"; do
    if [[ "$word" =~ $plain ]]; then printf '%s ' "$word"; else printf '"%s" ' "$word"; fi
  done
  echo
}

# The state of the queued resource; NONE if there is none.
state() {
  local describe=("${queued[@]}" describe "$name" "${where[@]}" "--format=value(state.state)")
  if [[ -n "$dry_run" ]]; then
    run "${describe[@]}" >&2
    echo "$1"
  else
    "${describe[@]}" 2>/dev/null || echo NONE
  fi
}

acquire() {
  local now
  created=""
  now="$(state NONE)"
  if [[ "$now" == SUSPEND* || "$now" == FAILED ]]; then
    echo "the slice $name is $now (preempted or never granted); requesting it again" >&2
    run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
    now=NONE
  fi
  if [[ "$now" == NONE ]]; then
    run "${queued[@]}" create "$name" "${where[@]}" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$runtime" ${create_flags[@]+"${create_flags[@]}"}
    created=yes
  fi
  until now="$(state ACTIVE)" && [[ "$now" == ACTIVE ]]; do
    if [[ "$now" == FAILED || "$now" == SUSPEND* ]]; then
      fail "the slice $name is $now; see: ${queued[*]} describe $name ${where[*]}"
    fi
    echo "$(date +%H:%M:%S) waiting for the slice $name: $now" >&2
    sleep 30
  done
}

check_workdir() {
  local hosts
  if [[ -z "$workdir" || "$workdir" == gs://* || "$workdir" == /* || -n "$dry_run" ]]; then return; fi
  hosts="$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    "--format=value(networkEndpoints.len())")"
  ((hosts == 1)) || fail "--workdir=$workdir: the $hosts hosts of $name share no disk, so each would keep" \
    "only its part of a checkpoint; use object storage: --workdir=gs://BUCKET/RUN"
}

copy_and_install() {
  local directory file
  directory="$(mktemp -d)"
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e "$file" ]]; then printf '%s\0' "$file"; fi  # Deleted files may still be listed.
  done | tar --null -T - -czf "$directory/drpo_jax.tar.gz"
  run "${scp[@]}" "$directory/drpo_jax.tar.gz" "$name:" --worker=all
  rm -r "$directory"
  run "${ssh[@]}" --worker=all \
    --command="mkdir -p drpo_jax && tar -xzf drpo_jax.tar.gz -C drpo_jax && $host install"
}

# Starts the command on all hosts, unless an earlier call started it and it is still running.
start() {
  local status=1
  if [[ -z "$created" ]]; then
    status=0
    run "${ssh[@]}" --worker=0 --command="$host running $command" || status=$?
  fi
  if ((status == 2)); then exit 2; fi
  if ((status)); then
    copy_and_install
    run "${ssh[@]}" --worker=all --command="$host start $command"
  fi
}

# Shows the output of the first host until the command ends there; reconnects when the connection breaks.
follow() {
  local status lines=+1
  while true; do
    status=0
    run "${ssh[@]}" --ssh-flag="-o ServerAliveInterval=30" --worker=0 --command="$host follow $lines" ||
      status=$?
    if ((status != 255)) || [[ "$(state ACTIVE)" != ACTIVE ]]; then return "$status"; fi
    echo "connection lost; reconnecting" >&2
    lines=20
    sleep 10
  done
}

if [[ -n "$stop" ]]; then
  run "${ssh[@]}" --worker=all --command="$host stop"
  exit
fi
for ((attempt = 0; ; attempt++)); do
  acquire
  check_workdir
  start
  status=0
  follow || status=$?
  if ((status == 0)) || [[ "$(state ACTIVE)" == ACTIVE ]]; then break; fi
  if ((attempt >= restarts)); then
    echo "error: the slice $name was preempted; the same call resumes from the last checkpoint" >&2
    exit 1
  fi
  echo "the slice $name was preempted; restart $((attempt + 1)) of at most $restarts" >&2
done
run "${ssh[@]}" --worker=all --command="$host result" || true
if [[ -n "$workdir" && "$workdir" != gs://* && "$workdir" != /* ]]; then
  mkdir -p "$(dirname "$workdir")"
  run "${scp[@]}" --recurse "$name:drpo_jax/$workdir" "$(dirname "$workdir")/" --worker=0
fi
if [[ -n "$delete" ]]; then
  run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
fi
exit "$status"
