"""Class names at scale: one run of bytes, mapped, from which names are cut on demand.

Shapes: C classes, B bytes of all names together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Union, overload

import numpy as np

from trainer.errors import UserError


class ClassNames(Sequence[str]):
  """A sequence of class names; class ids are positions in it.

  Attributes:
    text: [B] uint8, all names in UTF-8, one after the other.
    starts: [C + 1] int64, where each name starts in the text.
    hashes: [C] uint64, a stable hash of each name.
  """

  def __init__(self, text: np.ndarray, starts: np.ndarray, hashes: np.ndarray):
    self.text = text
    self.starts = starts
    self.hashes = hashes

  @classmethod
  def of(cls, names: Iterable[str]) -> ClassNames:
    """The names themselves if they are `ClassNames` already, otherwise built."""
    if isinstance(names, cls):
      return names
    encoded = [name.encode() for name in names]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(name) for name in encoded], out=starts[1:])
    hashes = np.array([_hash(name) for name in encoded], np.uint64)
    return cls(np.frombuffer(b"".join(encoded), np.uint8), starts, hashes)

  def __len__(self) -> int:
    return len(self.starts) - 1

  @overload
  def __getitem__(self, class_id: int) -> str: ...

  @overload
  def __getitem__(self, class_id: slice) -> list[str]: ...

  def __getitem__(self, class_id: Union[int, slice]) -> Union[str, list[str]]:
    if isinstance(class_id, slice):
      return [self[i] for i in range(*class_id.indices(len(self)))]
    position = range(len(self))[class_id]
    start, end = self.starts[position : position + 2]
    return _text(self.text[start:end].tobytes())

  def __iter__(self) -> Iterator[str]:
    text = self.text.tobytes()
    starts = self.starts.tolist()
    for start, end in zip(starts, starts[1:]):
      yield _text(text[start:end])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and list(self) == list(other)

  def __repr__(self) -> str:
    return f"ClassNames({len(self)} names)"


def _text(name: bytes) -> str:
  try:
    return name.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f"The index is damaged (a class name {name!r:.60} that is no UTF-8); delete it "
      "and make it again with --mode=ingest."
    ) from error


def _hash(name: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
