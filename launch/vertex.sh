#!/usr/bin/env bash
# Submits a run as a Vertex AI custom job, with gcloud:
#   ./launch/vertex.sh RUN.gin --region=R --bucket=gs://BUCKET/FOLDER [options] [flags]
# Uploads a source distribution and the full config to the bucket, which is mounted in the
# job as /gcs, and starts trainer.task from them in one of Google's images. The run's folder
# is in the bucket too. Options: --project=P, --name=NAME, --num_workers=N (1), --machine=TYPE,
# --gpu=TYPE, --num_gpus=N (1), --image=IMAGE, --dry_run to print the commands.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/python.sh"

run='' region='' bucket='' name='' num_workers=1 machine=n1-standard-8 gpu='' num_gpus=1 is_dry=''
image=us-docker.pkg.dev/vertex-ai/training/tf-gpu.2-15.py310:latest project=() rest=()
for word in "$@"; do
  value=${word#*=}
  case $word in
    --region=?*) region=$value ;;
    --bucket=gs://?*) bucket=${value%/} ;;
    --project=?*) project=("$word") ;;
    --name=?*) name=$value ;;
    --num_workers=[1-9]*) num_workers=$value ;;
    --machine=?*) machine=$value ;;
    --gpu=?*) gpu=$value ;;
    --num_gpus=[1-9]*) num_gpus=$value ;;
    --image=?*) image=$value ;;
    --dry_run) is_dry=yes ;;
    --region* | --bucket* | --project* | --name* | --num_workers* | --machine* | --gpu* | \
      --num_gpus* | --image*) fail "$word has no value that fits." ;;
    --model_dir*) fail "$word: the run's folder is that of --bucket." ;;
    *';'*) fail "$word: a ';' can't be passed on." ;;
    -*) rest+=("$word") ;;
    *) [ -z "$run" ] || fail "two run files, $run and $word; one is needed."
      run=$(find_run "$word") ;;
  esac
done
[ -n "$run" ] || fail "a run file is needed; those that come with this are in configs/runs."
[ -n "$region" ] || fail "--region=REGION is needed."
[ -n "$bucket" ] || fail "--bucket=gs://BUCKET/FOLDER is needed."
cd "$here/.."
name=${name:-$(basename "$run" .gin)}
folder=$bucket/$name mounted=/gcs/${bucket#gs://}/$name
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' trainer/__init__.py)
package=retrieval_trainer-$version.tar.gz
[ -n "$is_dry" ] || command -v gcloud >/dev/null || fail "there is no gcloud here; install Google's command line."

# The overrides become part of the config; the other flags are passed to the job.
params=() flags=()
for word in ${rest[@]+"${rest[@]}"}; do
  case $word in --gin_param=*) params+=("$word") ;; *) flags+=("$word") ;; esac
done
scratch=scratch python=${TRAINER_PYTHON:-.venv/bin/python}
if [ -z "$is_dry" ]; then
  task_python
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" launch/lint.py --mode=train_and_evaluate --model_dir="$mounted" --gin_file="$run" \
    ${params[@]+"${params[@]}"} ${flags[@]+"${flags[@]}"} >"$scratch/run.gin"
fi

# pool NUMBER: prints the spec of a pool of NUMBER equal workers.
pool() {
  printf 'replica-count=%s,machine-type=%s' "$1" "$machine"
  [ -z "$gpu" ] || printf ',accelerator-type=%s,accelerator-count=%s' "$gpu" "$num_gpus"
  printf ',executor-image-uri=%s,python-module=trainer.task' "$image"
}
pools=(--worker-pool-spec="$(pool 1)")
# Vertex treats the first pool as the chief, and sets TF_CONFIG for all.
((num_workers == 1)) || pools+=(--worker-pool-spec="$(pool $((num_workers - 1)))")
arguments=$(printf ';%s' --mode=train_and_evaluate --gin_file="$mounted/run.gin" \
  --model_dir="$mounted" ${flags[@]+"${flags[@]}"})

do_it "$python" setup.py --quiet sdist --formats=gztar --dist-dir="$scratch"
# Versions of setuptools write the name with '-' or with '_'.
[ -n "$is_dry" ] || package=$(basename "$scratch"/*.tar.gz)
do_it gcloud storage cp "$scratch/$package" "$scratch/run.gin" "$folder/"
do_it gcloud ai custom-jobs create ${project[@]+"${project[@]}"} --region="$region" --display-name="$name" \
  --python-package-uris="$folder/$package" "${pools[@]}" --args="^;^${arguments:1}"
