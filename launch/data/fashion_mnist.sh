#!/usr/bin/env bash
# Copies Fashion-MNIST's four idx files to data/fashion_mnist_idx, from Debian's package
# (apt-get, 31 MB) or from a given folder: ./launch/data/fashion_mnist.sh [FOLDER]
set -euo pipefail

names=(train-images-idx3-ubyte train-labels-idx1-ubyte
  t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)

fail() {
  echo "error: $1" >&2
  exit 2
}

# Prints the path of a file in a folder, plain or gzipped; nothing if it is missing.
find_file() {
  local path
  for path in "$1/$2" "$1/$2.gz"; do
    if [ -f "$path" ]; then
      echo "$path"
      return
    fi
  done
}

has_all() {
  local name
  for name in "${names[@]}"; do
    [ -n "$(find_file "$1" "$name")" ] || return 1
  done
}

source=
if [ $# -gt 0 ]; then
  source=$(cd -- "$1" 2>/dev/null && pwd) || fail "$1 is no folder that can be read."
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=data/fashion_mnist_idx

if [ -z "$source" ] && has_all "$target"; then
  echo "Fashion-MNIST is in $target already."
  exit 0
fi

mkdir -p "$target" 2>/dev/null || fail "$PWD/$target can't be made."
staging_dir=$(mktemp -d)
trap 'rm -rf "$staging_dir"' EXIT

if [ -z "$source" ]; then
  advice="give a folder that has the four files: $0 FOLDER"
  for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "this machine has no $tool; $advice"
  done
  source=$staging_dir/files
  if ! (cd "$staging_dir" && apt-get download -qq dataset-fashion-mnist) >"$staging_dir/log" 2>&1; then
    fail "dataset-fashion-mnist can't be fetched ($(tail -n 1 "$staging_dir/log")); try apt-get update, or $advice"
  fi
  dpkg -x "$staging_dir"/dataset-fashion-mnist*.deb "$staging_dir/package" 2>"$staging_dir/log" ||
    fail "the package can't be unpacked: $(tail -n 1 "$staging_dir/log")"
  mkdir "$source"
  find "$staging_dir/package" -type f -name '*-ubyte*' -exec mv {} "$source" \;
fi

for name in "${names[@]}"; do
  [ -n "$(find_file "$source" "$name")" ] || fail "$source has neither $name nor $name.gz."
done
if [ "$source" -ef "$target" ]; then
  echo "Fashion-MNIST is in $target already."
  exit 0
fi

# Each file is copied under a temporary name first, so that a partial copy is never used.
for name in "${names[@]}"; do
  file=$(find_file "$source" "$name")
  cp -- "$file" "$target/.partial" 2>"$staging_dir/log" ||
    fail "$file can't be copied: $(tail -n 1 "$staging_dir/log")"
  rm -f "$target/$name" "$target/$name.gz"
  mv "$target/.partial" "$target/$(basename "$file")"
done
echo "Fashion-MNIST is in $target."
