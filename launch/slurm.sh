#!/usr/bin/env bash
# Submits a run to Slurm, one task per node:  ./launch/slurm.sh --nodes=2 RUN.gin [flags]
# or a sweep, whose workers share its points: ./launch/slurm.sh --array=8 --sweep SWEEP.gin
# Options: --nodes=N (1), --tasks_per_node=N (1), --gpus_per_node=N, --cpus_per_task=N,
# --partition=P, --account=A, --time=T, --max_restarts=N (20), --warn_s=S (120): time before
# the limit at which the run saves and is requeued, --wait for the end, --dry_run to print
# the script. Other flags are the task's, or the sweep's. The folder must be on a disk
# shared by all nodes.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

nodes=1 tasks_per_node=1 array='' warn_s=120 max_restarts=20 is_sweep='' is_dry='' run=''
asked=() submit=(sbatch --parsable) rest=()
for word in "$@"; do
  value=${word#*=}
  case $word in
    --nodes=[1-9]*) nodes=$value ;;
    --tasks_per_node=[1-9]*) tasks_per_node=$value ;;
    --array=[1-9]*) array=$value ;;
    --warn_s=[0-9]*) warn_s=$value ;;
    --max_restarts=[0-9]*) max_restarts=$value ;;
    --gpus_per_node=[1-9]* | --cpus_per_task=[1-9]* | --partition=?* | --account=?* | --time=?*)
      name=${word%%=*}
      asked+=("#SBATCH ${name//_/-}=$value") ;;
    --nodes* | --tasks_per_node* | --array* | --warn_s* | --max_restarts* | --gpus_per_node* | \
      --cpus_per_task* | --partition* | --account* | --time*) fail "$word has no value that fits." ;;
    --sweep) is_sweep=yes ;;
    --wait) submit+=(--wait) ;;
    --dry_run) is_dry=yes ;;
    -*) rest+=("$word") ;;
    *) [ -z "$run" ] || fail "two files, $run and $word; one is needed."
      run=$(find_run "$word") ;;
  esac
done
[ -n "$run" ] || fail "a run file is needed; those that come with this are in configs/runs."
if [ -n "$is_sweep" ]; then
  ((nodes * tasks_per_node == 1)) || fail "a sweep's workers are single tasks; use --array=N for more of them."
elif [ -n "$array" ]; then
  fail "--array is for --sweep: a run has one folder."
fi

cd "$here/.."
python=${TRAINER_PYTHON:-.venv/bin/python}
name=$(basename "$run" .gin)
if [ -n "$is_sweep" ]; then
  folder=runs/sweeps/$name
  command=("$python" -m trainer.sweep "$run" ${rest[@]+"${rest[@]}"})
  check=("${command[@]}" --dry_run)
else
  folder=runs/$name
  for word in ${rest[@]+"${rest[@]}"}; do
    case $word in --model_dir=*) folder=${word#*=} ;; esac
  done
  command=("$python" -m trainer.task --mode=train_and_evaluate --gin_file="$run"
    --model_dir="$folder" ${rest[@]+"${rest[@]}"})
  check=("$python" launch/lint.py "${command[@]:3}")
fi
# Workers of a sweep get the warning like tasks: they end their runs and exit with 3.
number=%j
[ -z "$array" ] || number=%A_%a

script=$(cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks_per_node
$(printf '%s\n' ${asked[@]+"${asked[@]}"} ${array:+"#SBATCH --array=0-$((array - 1))"})
#SBATCH --output=$folder/slurm-$number.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@$warn_s
cd $(printf %q "$PWD") || exit
# An array's last element has the array's own number: only this name means it alone.
id=\${SLURM_ARRAY_JOB_ID:+\${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID}
id=\${id:-\$SLURM_JOB_ID}
# The first task that fails writes why; those that Slurm then ends do not.
export STATUS_FILE=$(printf %q "$folder")/slurm-status-\$id
rm -f "\$STATUS_FILE"
# Slurm warns this shell, which asks the tasks to save. What a user cancels takes no more
# signals, and stays cancelled.
is_told='' is_warned=''
trap 'is_told=yes; ! scancel --signal=TERM "\$id" 2>/dev/null || is_warned=yes' TERM
# Slurm signals this shell and not what runs in it. A task that has not ended by three
# quarters of the warning's time is ended.
srun --label --kill-on-bad-exit=1 --distribution=block bash -c '
end_late() { for _ in \$(seq $((warn_s * 3 / 4))); do sleep 1; kill -0 \$task || exit; done; kill -KILL \$task; }
trap "kill -TERM \$task 2>/dev/null; end_late 2>/dev/null &" TERM
"\$@" & task=\$!
until wait \$task; status=\$?; ! kill -0 \$task 2>/dev/null; do :; done
set -o noclobber
[ \$status = 0 ] || echo \$status 2>/dev/null >"\$STATUS_FILE"
exit \$status' task \
  $(printf ' %q' "${command[@]}") &
step=\$!
until wait \$step; status=\$?; ! kill -0 \$step 2>/dev/null; do :; done
[ ! -s "\$STATUS_FILE" ] || status=\$(<"\$STATUS_FILE")
rm -f "\$STATUS_FILE"
[ "\$is_told" = "\$is_warned" ] || exit "\$status"
# 3: saved; 4: a worker was lost, as it is when a signal ended one.
if [[ \$status == [34] ]] || ((status > 128)); then
  if ((\${SLURM_RESTART_COUNT:-0} < $max_restarts)); then
    echo "exit status \$status, warned: \${is_warned:-no}; queued again."
    exec scontrol requeue "\$id"
  fi
fi
exit \$status
END
)
if [ -n "$is_dry" ]; then
  echo "$script"
  exit
fi

command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a login node of the cluster."
said=$("${check[@]}" 2>&1 >/dev/null) || fail "${said##*error: }"
said=$(sbatch --test-only <<<"$script" 2>&1) || {
  said=${said##*error: }
  fail "Slurm refuses: ${said##*allocation failure: }"
}
mkdir -p "$folder"
"${submit[@]}" <<<"$script"
