# Sourced by the launch scripts: finds a fitting Python, and makes environments.
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

# make_environment FOLDER REQUIREMENT VERSION...: an environment with the package in it.
# Does nothing where that is done, for this setup.py and requirement in this place.
make_environment() {
  local folder=$1 requirement=$2 python stamp
  shift 2
  stamp=$folder/installed-$({ pwd && echo "$requirement" && cat setup.py; } | cksum | tr ' ' '-')
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
    echo "Updating $folder, because setup.py or what is asked of it has changed." >&2
  fi
  rm -f "$folder"/installed-*
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check \
    --editable "$requirement" </dev/null || return
  touch "$stamp"
}
