#!/usr/bin/env bash
# Runs a command of the task, and restarts it from its newest checkpoint as long as it
# exits with 3 (preempted) or 4 (stalled, or a worker lost):
#   ./launch/supervise.sh [--max_restarts=N] python -m trainer.task --model_dir=DIR ...
# Gives up after N consecutive restarts (5) without a newer checkpoint in --model_dir. Waits
# 1 s before the first restart, and twice as long before each next, up to 60 s. Signals are
# passed on, and end the restarts. The exit status is the command's last one. If this script
# is killed, the kernel terminates the command, provided that setpriv is available.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/restarts.sh
. "$here/restarts.sh"

max_restarts=5
case ${1:-} in
  --max_restarts=[0-9]*) max_restarts=${1#*=} && shift ;;
  -*) fail "$1 is none of --max_restarts=N; the command comes next." ;;
esac
[ $# -gt 0 ] || fail "a command is needed, such as python -m trainer.task with its flags."
model_dir=
for word in "$@"; do
  case $word in --model_dir=*) model_dir=${word#*=} ;; esac
done
[ -n "$model_dir" ] || fail "the command has no --model_dir=DIR, in which progress is seen."

tied=()
if setpriv --pdeathsig=TERM true 2>/dev/null; then
  tied=(setpriv --pdeathsig=TERM)
fi

child=''
# pass SIGNAL: sends it to the command; the command gets signals of the terminal directly.
pass() {
  times_told=$((times_told + 1))
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass TERM' TERM HUP
trap 'pass INT' INT

run_once() {
  local status=0 found told=-1
  # A background command ignores SIGINT, unless it has its own process group.
  set -m
  ${tied[@]+"${tied[@]}"} "$@" </dev/null &
  child=$!
  set +m
  # A signal ends `wait` with a status that is not the child's. Only another `wait` returns
  # it, or reports that there is no such child if the first status was the child's.
  while ((told != times_told)); do
    told=$times_told found=0
    wait "$child" || found=$?
    ((found == 127)) || status=$found
  done
  child=
  return "$status"
}
keep_running "$model_dir" "$max_restarts" run_once "$@"
