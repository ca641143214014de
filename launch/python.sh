# Sourced by the launch scripts: finds a fitting Python, and makes environments.
# shellcheck shell=bash

# Prints the path of the first of the given versions (3.11, 3.10, ...) that runs here.
find_python() {
  local version candidate
  for version in "$@"; do
    for candidate in "python$version" "$HOME"/.pyenv/versions/"$version"*/bin/python; do
      # A shim on the path may stand for a Python that isn't there: only running tells.
      if "$candidate" -c "import sys, venv, ensurepip
sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; then
        command -v "$candidate"
        return
      fi
    done
  done
  echo "error: no Python $* was found; install one (for example python$1 with its" \
    "venv package from your distribution, or 'pyenv install $1')." >&2
  return 2
}

# make_environment FOLDER REQUIREMENT VERSION...: an environment with the package in it.
# Does nothing where that is done already, for this setup.py.
make_environment() {
  local folder=$1 requirement=$2 python stamp
  shift 2
  stamp="$folder/installed-$(cksum <setup.py | tr ' ' '-')"
  [ -e "$stamp" ] && return
  if ! "$folder/bin/python" -c "" 2>/dev/null; then
    python=$(find_python "$@") || return
    echo "Making $folder with $("$python" --version); about two minutes." >&2
    "$python" -m venv --clear "$folder" || return
  fi
  echo "Installing $requirement into $folder." >&2
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable "$requirement" 2> >(grep -v '^WARNING: Location' >&2) || return
  rm -f "$folder"/installed-*
  touch "$stamp"
}
