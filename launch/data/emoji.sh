#!/usr/bin/env bash
# Creates data/emoji_arrays from eleven npm packages (31 MB), or from a folder with one
# subfolder and its icons.json per package: ./launch/data/emoji.sh [ICONS_FOLDER]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/../python.sh"

packages=(twemoji openmoji noto noto-v1 fluent-emoji fluent-emoji-flat
  fluent-emoji-high-contrast emojione emojione-v1 emojione-monotone fxemoji)

icons=
if [ $# -gt 0 ]; then
  icons=$(cd -- "$1" 2>/dev/null && pwd) || fail "$1 is no folder that can be read."
fi
cd "$here/../.."
target=data/emoji_arrays
if [ -e "$target/labels.npy" ]; then
  echo "The emoji are in $target already."
  exit 0
fi
task_python datasets

staging_dir=$(mktemp -d)
trap 'rm -rf "$staging_dir"' EXIT
if [ -z "$icons" ]; then
  advice="give a folder that has the icons: $0 ICONS_FOLDER"
  command -v npm >/dev/null || fail "this machine has no npm; $advice"
  icons=$staging_dir/icons
  echo "Fetching ${#packages[@]} packages of emoji."
  for package in "${packages[@]}"; do
    archive=$(cd "$staging_dir" && npm pack --silent "@iconify-json/$package" 2>"$staging_dir/log") ||
      fail "@iconify-json/$package can't be fetched ($(tail -n 1 "$staging_dir/log")); $advice"
    mkdir -p "$icons/$package"
    tar -xzf "$staging_dir/$archive" -C "$icons/$package" package/icons.json 2>"$staging_dir/log" ||
      fail "@iconify-json/$package can't be unpacked: $(tail -n 1 "$staging_dir/log")"
  done
fi
echo "Drawing: half a minute on two cores."
"$python" launch/data/emoji.py "$icons" "$target"
