# Sourced by the launch scripts: restarts a run depending on its exit status.
# shellcheck shell=bash

# Number of termination signals received, incremented by traps.
times_told=0

# newest_step MODEL_DIR: prints the step of the newest checkpoint, 0 if there is none.
newest_step() {
  local path step newest=0
  for path in "$1"/checkpoints/ckpt-*.json; do
    step=${path##*ckpt-}
    step=${step%.json}
    [[ ! $step =~ ^[0-9]+$ ]] || ((step <= newest)) || newest=$step
  done
  echo "$newest"
}

# keep_running MODEL_DIR MAX COMMAND...: restarts the command as long as it exits with 3
# (preempted) or 4 (stalled, lost), or ends by a signal. The wait doubles from 1 s to 60 s.
# Gives up after MAX consecutive restarts without a newer checkpoint. A script that
# received a termination signal restarts nothing.
keep_running() {
  local model_dir=$1 max=$2 status reached newest tries=0 pause
  shift 2
  reached=$(newest_step "$model_dir")
  while true; do
    status=0
    "$@" || status=$?
    # Ended by a signal: the process is lost, which is status 4.
    ((status <= 128 || status == 130)) || status=4
    if ((times_told > 0)) || [[ $status != [34] ]]; then
      return "$status"
    fi
    newest=$(newest_step "$model_dir")
    ((newest <= reached)) || tries=0
    reached=$newest
    if ((tries >= max)); then
      echo "exit status $status: given up after $tries restarts without a newer checkpoint (step $newest)." >&2
      return "$status"
    fi
    tries=$((tries + 1))
    pause=$((tries > 6 ? 60 : 1 << (tries - 1)))
    echo "exit status $status: ${restarted:-the run} will start again in $pause s, from step $newest ($tries of $max without progress)." >&2
    sleep "$pause" &
    wait $! || true
    if ((times_told > 0)); then
      return "$status"
    fi
  done
}
