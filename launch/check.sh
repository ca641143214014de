#!/usr/bin/env bash
# Runs formatting, lint, types and tests:
#   ./launch/check.sh [--python=3.12] [--short | --thorough | --install]
# --python: uses that Python's stack. --short: runs only the tests of the main guarantees.
# --thorough: runs only the further cases that the check leaves out. --install: only makes
# the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=(3.11 3.10 3.9)
selection=
is_install=
for flag in "$@"; do
  case $flag in
    --python=3.9 | --python=3.1[0-3]) versions=("${flag#*=}") ;;
    --short) selection="(main_job or golden or parity or resume) and not thorough" ;;
    --thorough) selection=thorough ;;
    --install) is_install=yes ;;
    *)
      echo "error: $flag is none of --python=3.9 to 3.13, --short, --thorough, --install." >&2
      exit 2
      ;;
  esac
done

# stage NAME COMMAND...: runs the command and prints its duration.
stage() {
  local start=$SECONDS
  "${@:2}"
  echo "== $1: $((SECONDS - start)) s"
}

# shellcheck source=launch/python.sh
. launch/python.sh
python=$(find_python "${versions[@]}")
version=$("$python" -c "import sys; print('%d.%d' % sys.version_info[:2])")
folder=.venv-check-$version
# Only what is imported is compiled, then; pip takes the word no-compile for its value.
export PIP_NO_COMPILE=0
stage install make_environment "$folder" ".[check]" "$version"
if [ -n "$is_install" ]; then
  exit
fi
export PATH="$PWD/$folder/bin:$PATH"

# A worker that has no tests left takes some of the other's.
tests=(python -m pytest -q -n 2 --dist worksteal)
if [ -n "$selection" ]; then
  stage "selected tests" "${tests[@]}" -m "$selection"
  exit
fi
stage format ruff format --check .
stage lint ruff check .
stage types mypy
stage shell shellcheck launch/*.sh launch/*/*.sh .ci/run
stage tests "${tests[@]}"
