#!/usr/bin/env bash
# Formatting, lint, types and all tests: ./launch/check.sh [--python=3.12] [--short]
# --python: on that Python's stack. --short: only the tests of the main promises.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=(3.11 3.10 3.9)
selection=()
lint=1
for flag in "$@"; do
  case $flag in
    --python=*) versions=("${flag#*=}") ;;
    --short) selection=(-m "main_job or golden or parity or resume") lint= ;;
    *) echo "error: $flag is not one of --python=VERSION, --short." >&2; exit 2 ;;
  esac
done

stage() {
  local start=$SECONDS
  "${@:2}"
  echo "== $1: $((SECONDS - start)) s"
}

# shellcheck source=launch/python.sh
. launch/python.sh
folder=.venv-check-${versions[0]}
stage install make_environment "$folder" ".[check]" "${versions[@]}"
export PATH="$PWD/$folder/bin:$PATH"
if [ -n "$lint" ]; then
  stage format ruff format --check .
  stage lint ruff check .
  stage types mypy
  stage shell shellcheck launch/*.sh launch/data/*.sh .ci/run
fi
stage tests python -m pytest -n 2 --dist loadfile "${selection[@]}"
