"""The hash of a file, by which it is known again."""

from __future__ import annotations

import hashlib

_BLOCK_BYTES = 1 << 20


def sha256_of(path: str) -> str:
  """SHA-256 of a file's content, in hexadecimal."""
  contents = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(_BLOCK_BYTES):
      contents.update(block)
  return contents.hexdigest()
