#!/usr/bin/env bash
# Runs a sweep file on this machine: ./launch/sweep.sh SWEEP.gin [flags]
# The same command resumes the sweep. Flags: those of `python -m trainer.sweep --help`, and
# after `--` the hardware flags of `python -m trainer.task`.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

[[ $# -gt 0 && $1 != -* ]] || fail "the first argument is the sweep file; those that come with this are in configs/sweeps."
sweep=$(find_run "$1")
shift
cd "$here/.."
task_python sweep
exec "$python" -m trainer.sweep "$sweep" "$@"
