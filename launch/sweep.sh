#!/usr/bin/env bash
# Makes the runs of a sweep file on this machine: ./launch/sweep.sh SWEEP.gin [flags]
# The same command again goes on where it stopped. Flags: those of `python -m
# trainer.sweep --help`, and after `--` those of hardware of `python -m trainer.task`.
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
