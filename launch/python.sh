# Sourced by the launch scripts: reports errors, finds files and a suitable Python, and
# creates environments.
# shellcheck shell=bash

# find_python VERSION...: prints the path of the first version that runs here.
find_python() {
  local version candidate
  for version in "$@"; do
    for candidate in "python$version" python3 \
      "${HOME:-}"/.pyenv/versions/"$version"*/bin/python; do
      # A shim on the path may refer to a missing Python, so run it.
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

# has_gpu: whether NVIDIA's driver shows a usable GPU.
has_gpu() {
  [[ ${CUDA_VISIBLE_DEVICES-all} != "" && ${CUDA_VISIBLE_DEVICES-all} != -1 ]] &&
    [[ $(nvidia-smi --list-gpus 2>/dev/null) == GPU* ]]
}

# make_environment FOLDER REQUIREMENT VERSION...: creates an environment with the package,
# or with the contents of REQUIREMENT if it is a file. Does nothing if the environment
# exists for this setup.py or file, requirement and folder.
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
  # A stamp of another setup.py marks a complete environment. Without a stamp, an existing
  # environment was interrupted.
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

# compiler_environment FOLDER: creates an environment with the compiler for TPUs, separate
# from TensorFlow's because the two need different NumPy versions.
compiler_environment() {
  make_environment "$1" launch/tpu_check.txt 3.12 3.13 3.11
}

# task_python [EXTRA]: sets `python` to $TRAINER_PYTHON, which must have the package, or to
# that of .venv, which is created with the extra if it is missing.
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

# fail MESSAGE: reports a user error in one line.
fail() {
  echo "error: $1" >&2
  exit 2
}

# find_run FILE: prints the full path of a run file or a sweep file.
find_run() {
  if [ ! -f "$1" ]; then
    fail "there is no run file $1; those that come with this are in configs/runs."
  fi
  echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

# do_it COMMAND...: runs the command, or with `is_dry` prints it.
do_it() {
  if [ -n "${is_dry:-}" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}
