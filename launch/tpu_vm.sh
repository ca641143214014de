#!/usr/bin/env bash
# Runs on Cloud TPU VMs, with gcloud:
#   ./launch/tpu_vm.sh ACTION NAME --zone=ZONE [options] [RUN.gin flags]
#   create    create the TPU, or reuse it, and install the trainer on all its hosts
#   queue     the same with a queued resource, which waits for a free TPU
#   run       start RUN.gin on the hosts (--worker=all, or a given one)
#   logs      follow the log of a host (--worker=0)
#   resume    after a preemption: delete the remains, create, install, run
#   delete    delete the TPU and its queued resource
# Options: --type=v5litepod-8, --version=RUNTIME, --project=P, --spot, --worker=W,
# --dry_run to print the commands. --model_dir=gs://BUCKET/FOLDER: the bucket is mounted on
# the hosts by gcsfuse, because the hosts' disks are deleted with them.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

action=${1:-} name=${2:-}
case $action in
  create | queue | run | logs | resume | delete) ;;
  *) fail "the action is create, queue, run, logs, resume or delete; given was '$action'." ;;
esac
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "'$name' is no name of a TPU: lower-case letters, digits and '-'."
shift 2

type=v5litepod-8 version=tpu-vm-tf-2.15.0-pjrt worker='' place=() spot=() is_dry='' run='' rest=() model_dir=''
for word in "$@"; do
  value=${word#*=}
  case $word in
    --zone=?* | --project=?*) place+=("$word") ;;
    --type=?*) type=$value ;;
    --version=?*) version=$value ;;
    --worker=?*) worker=$value ;;
    --spot) spot=(--spot) ;;
    --dry_run) is_dry=yes ;;
    --model_dir=gs://?*/?*) model_dir=$value ;;
    --model_dir*) fail "$word is not in a bucket (gs://BUCKET/FOLDER), and a TPU's disk goes with it." ;;
    --zone* | --project* | --type* | --version* | --worker*) fail "$word has no value that fits." ;;
    -*) rest+=("$word") ;;
    *) [ -z "$run" ] || fail "two run files, $run and $word; one is needed."
      run=$word ;;
  esac
done
[[ " ${place[*]-} " == *" --zone="* ]] || fail "--zone=ZONE is needed."
cd "$here/.."
if [[ $action == run || $action == resume ]]; then
  [[ $run == configs/* && -f $run ]] || fail "a run file below configs is needed, which is copied to the hosts; given was '$run'."
  [ -n "$model_dir" ] || fail "--model_dir=gs://BUCKET/FOLDER is needed."
fi
[ -n "$is_dry" ] || command -v gcloud >/dev/null || fail "there is no gcloud here; install Google's command line."

tpu() { do_it gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"; }
queued() { do_it gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }
state() { [ -n "$is_dry" ] || gcloud compute tpus "$1" describe "$name" "${place[@]}" --format="value($2)" 2>/dev/null || true; }

create() {
  [ "$(state tpu-vm state)" = READY ] || tpu create --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}
}

queue() {
  queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot[@]+"${spot[@]}"}
  queued describe --format="value(state.state)"
  [ -n "$is_dry" ] || until [ "$(state queued-resources state.state)" = ACTIVE ]; do
    [ "$(state queued-resources state.state)" != FAILED ] || fail "the queued resource $name has failed; see 'gcloud compute tpus queued-resources describe $name'."
    sleep 30
  done
}

# The image includes TensorFlow for TPUs, which pip must not replace.
install() {
  tpu ssh --worker=all --command="command -v gcsfuse >/dev/null || { echo 'error: these hosts have no gcsfuse; install it: https://cloud.google.com/storage/docs/cloud-storage-fuse/install' >&2; exit 2; }" &&
  tpu ssh --worker=all --command="mkdir -p retrieval-trainer" &&
  do_it gcloud compute tpus tpu-vm scp --recurse --worker=all "${place[@]}" \
    trainer configs setup.py pyproject.toml README.md LICENSE "$name:retrieval-trainer" &&
  tpu ssh --worker=all --command="cd retrieval-trainer && python3 -m pip install -q absl-py gin-config google-crc32c scikit-learn 'numpy<2' && python3 -m pip install -q --no-deps --editable ."
}

run() {
  local bucket=${model_dir#gs://} mount task
  local path=${bucket#*/}
  bucket=${bucket%%/*}
  local mounted=buckets/$bucket
  # A mining round is a folder that is renamed when it is complete.
  mount="mkdir -p $mounted && { mountpoint -q $mounted || gcsfuse --implicit-dirs --rename-dir-limit=1000 $bucket $mounted; }"
  task=$(printf ' %q' python3 -m trainer.task --mode=train_and_evaluate --strategy=tpu --gin_file="$run" --model_dir="$mounted/$path" ${rest[@]+"${rest[@]}"})
  tpu ssh --worker="${worker:-all}" --command="cd retrieval-trainer && $mount && { nohup$task >log.txt 2>&1 </dev/null & }"
}

delete() {
  tpu delete --quiet
  [ -z "$is_dry$(state queued-resources state.state)" ] || queued delete --quiet --force
}

case $action in
  create) create && install ;;
  queue) queue && install ;;
  run) run ;;
  logs) tpu ssh --worker="${worker:-0}" --command="tail -n 50 -F retrieval-trainer/log.txt" ;;
  resume)
    found=$(state tpu-vm state)
    [[ $is_dry || $found == PREEMPTED || $found == TERMINATED || -z $found ]] || fail "$name is $found and needs no resuming."
    [ -z "$is_dry$found" ] || delete
    create && install && run ;;
  delete) delete ;;
esac
