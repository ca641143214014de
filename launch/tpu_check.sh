#!/usr/bin/env bash
# Compiles the training step of a run file for a TPU, without a TPU, data or an account:
#   ./launch/tpu_check.sh RUN.gin --topology=v5e:2x4 [flags]
# The compiler has its own environment, .venv-tpu (Linux on x86-64, Python 3.11 or newer;
# 1.1 GB). Flags are those of --help.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

run=()
if [[ $# -gt 0 && $1 != -* ]]; then
  run=("$(find_run "$1")")
  shift
fi
cd "$here/.."
task_python
if [ ${#run[@]} -gt 0 ]; then
  [[ $(uname -sm) == "Linux x86_64" ]] || fail "libtpu runs on Linux on x86-64; this is $(uname -sm)."
  compiler_environment .venv-tpu
fi
exec "$python" -m trainer.tpu_check ${run[@]+"${run[@]}"} "$@"
