#!/usr/bin/env bash
# Installs, trains and evaluates on this machine: ./launch/local.sh [RUN.gin] [flags]
# The default run file is configs/runs/digits.gin, on all GPUs or two virtual replicas.
# CUDA_VISIBLE_DEVICES selects the GPUs. Flags are those of `python -m trainer.task
# --help`; a later flag overrides an earlier one. Relative paths, in flags and run files,
# start at the project's folder. --max_restarts=N restarts a run that was preempted or
# stalled, see supervise.sh.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

run=
if [[ $# -gt 0 && $1 != -* ]]; then
  run=$(find_run "$1")
  shift
fi
rest=() supervised=()
for word in "$@"; do
  case $word in
    --max_restarts=[0-9]*) supervised=(launch/supervise.sh "$word") ;;
    --max_restarts*) fail "$word has no value that fits." ;;
    *) rest+=("$word") ;;
  esac
done
set -- ${rest[@]+"${rest[@]}"}
cd "$here/.."
if [ -z "$run" ] && ! has_gpu; then
  case " $*" in
    *" --strategy"* | *" --num_virtual_replicas"*) ;;
    *) set -- --num_virtual_replicas=2 "$@" ;;
  esac
fi
run=${run:-configs/runs/digits.gin}

task_python
exec ${supervised[@]+"${supervised[@]}"} "$python" -m trainer.task \
  --mode=train_and_evaluate --gin_file="$run" --model_dir="runs/$(basename "$run" .gin)" \
  "$@"
