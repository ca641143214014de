# Sourced by the launch scripts: refuses, finds files and a fitting Python, and makes
# environments.
# shellcheck shell=bash

# find_python VERSION...: prints the path of the first of the versions that runs here.
find_python() {
  local version candidate
  for version in "$@"; do
    for candidate in "python$version" python3 \
      "${HOME:-}"/.pyenv/versions/"$version"*/bin/python; do
      # A shim on the path may stand for a Python that isn't there: only running tells.
      if "$candidate" -c "import sys, venv, ensurepip
sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; then
        command -v "$candidate"
        return
      fi
    done
  done
  echo "error: no Python $* with its venv module was found; install one (for example" \
    "'apt-get install python$1-venv', or 'pyenv install $1')." >&2
  return 2
}

# has_gpu: whether NVIDIA's driver shows a GPU that may be used.
has_gpu() {
  [[ ${CUDA_VISIBLE_DEVICES-all} != "" && ${CUDA_VISIBLE_DEVICES-all} != -1 ]] &&
    [[ $(nvidia-smi --list-gpus 2>/dev/null) == GPU* ]]
}

# make_environment FOLDER REQUIREMENT VERSION...: an environment with the package in it,
# or, where REQUIREMENT is a file, with what it lists. Does nothing where that is done, for
# this setup.py or file and requirement in this place.
make_environment() {
  local folder=$1 requirement=$2 python setup stamp stamps source=setup.py option=--editable
  shift 2
  if [ -f "$requirement" ]; then
    source=$requirement option=--requirement
  fi
  setup=$folder/installed-$({ pwd && cat "$source"; } | cksum | tr ' ' '-')
  stamp=$setup-${requirement//[^a-z]/_}
  if [ -e "$stamp" ] && "$folder/bin/python" -c "" 2>/dev/null; then
    return
  fi
  # A stamp of another setup.py stands for a whole environment; without any, the one
  # that may be there was interrupted.
  if ! compgen -G "$folder/installed-*" >/dev/null ||
    ! "$folder/bin/python" -c "" 2>/dev/null; then
    python=$(find_python "$@") || return
    echo "Making $folder with $("$python" --version): two minutes, once." >&2
    "$python" -m venv --clear "$folder" || return
  else
    echo "Updating $folder, because $source or what is asked of it has changed." >&2
  fi
  stamps=$(compgen -G "$setup-*" || true)
  rm -f "$folder"/installed-*
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check \
    "$option" "$requirement" </dev/null || return
  touch "$stamp"
  while read -r stamp; do
    [ -z "$stamp" ] || touch "$stamp"
  done <<<"$stamps"
}

# compiler_environment FOLDER: an environment with the compiler for TPUs, apart from
# TensorFlow's, because the two want different NumPys.
compiler_environment() {
  make_environment "$1" launch/tpu_check.txt 3.12 3.13 3.11
}

# task_python [EXTRA]: sets `python` to $TRAINER_PYTHON, in which the package must be, or
# to that of .venv, which is made where it is missing, with what the extra names.
task_python() {
  local extras=${1:-}
  python=${TRAINER_PYTHON:-.venv/bin/python}
  if [ -n "${TRAINER_PYTHON:-}" ]; then
    return
  fi
  if has_gpu; then
    extras=cuda${extras:+,$extras}
  fi
  make_environment .venv ".${extras:+[$extras]}" 3.11 3.10 3.9 3.12 3.13
}

# fail MESSAGE: the user's mistake, in one line.
fail() {
  echo "error: $1" >&2
  exit 2
}

# find_run FILE: prints the whole path of a run file, or of a sweep file.
find_run() {
  if [ ! -f "$1" ]; then
    fail "there is no run file $1; those that come with this are in configs/runs."
  fi
  echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

# do_it COMMAND...: runs it, or with `is_dry` prints it as it would be typed.
do_it() {
  if [ -n "${is_dry:-}" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}
