#!/usr/bin/env bash
# Trains and evaluates on this machine, from nothing: ./launch/local.sh [RUN.gin] [flags]
# Without arguments: configs/runs/digits.gin on two virtual replicas.
# Flags are those of `python -m trainer.task --help`; a later one wins.
set -euo pipefail

run=
flags=()
if [[ ${1:-} == *.gin ]]; then
  run=$(realpath -m -- "$1")
  shift
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "$run" ]; then
  run=configs/runs/digits.gin
  [[ " $* " == *" --strategy"* ]] || flags+=(--num_virtual_replicas=2)
elif [ ! -f "$run" ]; then
  echo "error: $run is not there; the run files that come with this are in configs/runs." >&2
  exit 2
fi

# shellcheck source=launch/python.sh
. launch/python.sh
make_environment .venv . 3.11 3.10 3.9 3.12 3.13 || exit
exec .venv/bin/python -m trainer.task --mode=train_and_evaluate --gin_file="$run" \
  --model_dir="runs/$(basename "$run" .gin)" "${flags[@]}" "$@"
