#!/usr/bin/env bash
# Trains one job on several processes, locally or on hosts reached by ssh:
#   ./launch/multi_worker.sh --num_workers=2 RUN.gin [flags of trainer.task]
#   ./launch/multi_worker.sh --hosts=a,user@b RUN.gin [flags of trainer.task]
# Hosts need this folder at the same path, model_dir on a shared disk, ssh without password,
# and $TRAINER_PYTHON or .venv (created there by ./launch/local.sh). A failure of one worker
# ends all. Exit statuses 3 and 4 restart all, until --max_restarts=N (3) consecutive
# attempts have left no newer checkpoint. --dry_run prints the commands.
# Logs: combined output here, prefixed by worker, and one file per worker in
# runs/NAME/workers.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/restarts.sh
. "$here/restarts.sh"

hosts=() max_restarts=3 is_dry='' run='' num_workers='' rest=()
for word in "$@"; do
  case $word in
    --hosts=?*) IFS=, read -ra hosts <<<"${word#*=}" ;;
    --num_workers=[1-9]*) num_workers=${word#*=} ;;
    --max_restarts=[0-9]*) max_restarts=${word#*=} ;;
    --hosts* | --num_workers* | --max_restarts*) fail "$word has no value that fits." ;;
    --dry_run) is_dry=yes ;;
    -*) rest+=("$word") ;;
    *) [ -z "$run" ] || fail "two run files, $run and $word; one is needed."
      run=$(find_run "$word") ;;
  esac
done
[ -n "$run" ] || fail "a run file is needed; those that come with this are in configs/runs."
[ -z "$num_workers" ] || [ ${#hosts[@]} -eq 0 ] || fail "--hosts and --num_workers exclude each other."
is_local=
if [ ${#hosts[@]} -eq 0 ]; then
  [ -n "$num_workers" ] || fail "--hosts=a,b or --num_workers=N is needed."
  is_local=yes
  for ((i = 0; i < num_workers; i++)); do hosts+=(127.0.0.1); done
fi
cd "$here/.."
if [ -n "$is_local" ]; then
  task_python
else
  python=${TRAINER_PYTHON:-.venv/bin/python}
fi
folder=$(printf %q "$PWD")

# at HOST COMMAND: runs a shell command on the host, in the project's folder.
at() {
  if [ -n "$is_local" ]; then
    bash -c "cd $folder || exit; $2"
  else
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$1" "cd $folder || exit; $2"
  fi
}

# Local workers get one GPU of this machine each.
gpus=()
if [ -n "$is_local" ] && has_gpu; then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
  [ "${#gpus[@]}" -ge "${#hosts[@]}" ] || fail "${#hosts[@]} workers on ${#gpus[@]} GPUs; start no more workers than GPUs."
fi

# find_addresses: sets `addresses` to host:port of all workers, with free ports.
find_addresses() {
  local probe host port
  probe="$(printf %q "$python") -c 'import os, socket, sys
assert os.path.isfile(sys.argv[1]), \"no run file \" + sys.argv[1]
s = socket.socket(); s.bind((\"\", 0)); print(s.getsockname()[1])' $(printf %q "$run")"
  addresses=()
  for host in "${hosts[@]}"; do
    port=$(at "$host" "$probe" 2>&1 </dev/null | tail -n 1 || true)
    [[ $port =~ ^[0-9]+$ ]] || fail "host $host can't be used: ${port:-no answer from $python in $PWD}"
    # Two probes of one host may get the same port, but this is very unlikely.
    [[ " ${addresses[*]-} " != *" ${host#*@}:$port "* ]] || { find_addresses; return; }
    addresses+=("${host#*@}:$port")
  done
}

# command_of INDEX: prints the command for the worker's host.
command_of() {
  local workers task
  workers=$(printf ',"%s"' "${addresses[@]}")
  task="{\"cluster\":{\"worker\":[${workers:1}]},\"task\":{\"type\":\"worker\",\"index\":$1}}"
  printf 'env TF_CONFIG=%q' "$task"
  [ ${#gpus[@]} -eq 0 ] || printf ' CUDA_VISIBLE_DEVICES=%q' "${gpus[$1]}"
  printf ' %q' "$python" -m trainer.task --strategy=multi_worker \
    --mode=train_and_evaluate --gin_file="$run" --model_dir="$model_dir" ${rest[@]+"${rest[@]}"}
}

# tended COMMAND: runs the command, and terminates it when standard input closes, that is
# when this script ends for any reason, on any host; kills it after a minute.
tended() {
  echo "$1 </dev/null & pid=\$!
{ cat; kill \$pid; for _ in \$(seq 60); do sleep 1; kill -0 \$pid || exit; done
kill -9 \$pid; } <&0 >/dev/null 2>&1 & wait \$pid; status=\$?; kill \$! 2>/dev/null; exit \$status"
}

# run_worker INDEX: runs the worker to its end, with its log here, prefixed, and in a file.
run_worker() {
  at "${hosts[$1]}" "$(tended "$(command_of "$1")")" <&8 2>&1 |
    tee -a "$logs/worker-$1.txt" | sed -u "s/^/[worker $1] /"
}

# run_once: runs all workers; returns the exit status of the first that failed.
run_once() {
  local i left status first=0 told
  exec 9<>"$tie"
  exec 8<"$tie"
  for i in "${!hosts[@]}"; do
    (exec 9>&-; run_worker "$i") &
  done
  left=${#hosts[@]}
  while ((left > 0)); do
    status=0 told=$times_told
    wait -n || status=$?
    ((times_told == told)) || continue
    left=$((left - 1))
    if ((status != 0 && first == 0)); then
      first=$status
      exec 9>&-
    fi
  done
  exec 9>&-
  return "$first"
}

model_dir=runs/$(basename "$run" .gin)
for word in ${rest[@]+"${rest[@]}"}; do
  case $word in --model_dir=*) model_dir=${word#*=} ;; esac
done
find_addresses
if [ -n "$is_dry" ]; then
  for i in "${!hosts[@]}"; do echo "${hosts[$i]}: $(command_of "$i")"; done
  exit
fi

logs=$model_dir/workers
mkdir -p "$logs"
scratch=$(mktemp -d)
tie=$scratch/tie
mkfifo "$tie"
trap 'times_told=$((times_told + 1)); exec 9>&-' INT TERM HUP
trap 'rm -rf "$scratch"' EXIT
# run_anew: runs all workers with newly chosen free ports.
run_anew() {
  local status=0
  ((${#addresses[@]} > 0)) || find_addresses
  run_once || status=$?
  addresses=()
  return "$status"
}
restarted='all workers' keep_running "$model_dir" "$max_restarts" run_anew
