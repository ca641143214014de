#!/usr/bin/env bash
# Creates data/glyphs_arrays from the fonts of 21 Debian packages (apt-get, 160 MB), or
# from a folder with fonts: ./launch/data/glyphs.sh [FONTS_FOLDER]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/python.sh
. "$here/../python.sh"

packages=(kouzan-mouhitsu aoyagi-soseki arphic-ukai arphic-uming wqy-zenhei cwtex-fs
  cwtex-yen dotgothic16 rampart reggae rocknroll stick train yusei-magic seto kiloji
  konatu ipafont-mincho motoya-l-maruberi kanjistrokeorders mplus)

fonts=
if [ $# -gt 0 ]; then
  fonts=$(cd -- "$1" 2>/dev/null && pwd) || fail "$1 is no folder that can be read."
fi
cd "$here/../.."
target=data/glyphs_arrays
if [ -e "$target/held_out_fonts_labels.npy" ]; then
  echo "The glyphs are in $target already."
  exit 0
fi
task_python datasets

staging_dir=$(mktemp -d)
trap 'rm -rf "$staging_dir"' EXIT
if [ -z "$fonts" ]; then
  advice="give a folder that has fonts: $0 FONTS_FOLDER"
  for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "this machine has no $tool; $advice"
  done
  fonts=$staging_dir/fonts
  mkdir "$fonts"
  echo "Fetching ${#packages[@]} packages of fonts."
  for package in "${packages[@]}"; do
    (cd "$staging_dir" && apt-get download -qq "fonts-$package") >"$staging_dir/log" 2>&1 ||
      fail "fonts-$package can't be fetched ($(tail -n 1 "$staging_dir/log")); try apt-get update, or $advice"
    dpkg -x "$staging_dir"/fonts-"$package"_*.deb "$fonts/$package" 2>"$staging_dir/log" ||
      fail "fonts-$package can't be unpacked: $(tail -n 1 "$staging_dir/log")"
  done
fi
echo "Drawing: two minutes on two cores."
"$python" launch/data/glyphs.py "$fonts" "$target"
