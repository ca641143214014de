#!/usr/bin/env bash
# Puts Fashion-MNIST's four idx files into data/fashion_mnist_idx, from Debian's package
# (apt-get, 31 MB) or from a folder that has them: ./launch/data/fashion_mnist.sh [FOLDER]
set -euo pipefail

source=${1:+$(realpath -m -- "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=data/fashion_mnist_idx
names=(train-images-idx3-ubyte train-labels-idx1-ubyte
  t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)

if [ -z "$source" ]; then
  if ! command -v apt-get dpkg >/dev/null; then
    echo "error: this machine has no apt-get; give a folder with the four files." >&2
    exit 2
  fi
  aside=$(mktemp -d)
  trap 'rm -rf "$aside"' EXIT
  if ! (cd "$aside" && apt-get download -qq dataset-fashion-mnist); then
    echo "error: Debian's package dataset-fashion-mnist can't be fetched; try" \
      "'apt-get update', or give a folder with the four files." >&2
    exit 2
  fi
  dpkg -x "$aside"/*.deb "$aside/files"
  source=$(dirname "$(find "$aside/files" -name "${names[0]}*" | head -n 1)")
fi

mkdir -p "$target"
for name in "${names[@]}"; do
  if [ -f "$source/$name" ]; then
    cp "$source/$name" "$target/$name"
  elif [ -f "$source/$name.gz" ]; then
    cp "$source/$name.gz" "$target/$name.gz"
  else
    echo "error: $source has neither $name nor $name.gz." >&2
    exit 2
  fi
done
echo "Fashion-MNIST is in $target."
