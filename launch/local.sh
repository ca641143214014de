#!/usr/bin/env bash
# Trains and evaluates on this machine, from nothing: ./launch/local.sh [RUN.gin] [flags]
# Without a run file: configs/runs/digits.gin, on all GPUs or on two virtual replicas.
# Flags are those of `python -m trainer.task --help`; a later one wins. Relative paths in
# them start at the project's folder, as those in run files do.
set -euo pipefail

run=
if [[ $# -gt 0 && $1 != -* ]]; then
  if [ ! -f "$1" ]; then
    echo "error: there is no run file $1; those that come with this are in configs/runs." >&2
    exit 2
  fi
  run=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
  shift
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/python.sh
. launch/python.sh
requirement=.
if has_gpu; then
  requirement=".[cuda]"
elif [ -z "$run" ]; then
  case " $*" in
    *" --strategy"* | *" --num_virtual_replicas"*) ;;
    *) set -- --num_virtual_replicas=2 "$@" ;;
  esac
fi
run=${run:-configs/runs/digits.gin}

make_environment .venv "$requirement" 3.11 3.10 3.9 3.12 3.13
exec .venv/bin/python -m trainer.task --mode=train_and_evaluate --gin_file="$run" \
  --model_dir="runs/$(basename "$run" .gin)" "$@"
