"""One TFRecord file that is being written, and what the index must know of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from trainer.data import framing, manifest, paths
from trainer.data.index_builder import Labels, ShardIndex
from trainer.data.prepare import Prepared

_ENDING = ".part.json"


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """An item that was left out.

  Attributes:
    reason: names it and says why.
  """

  reason: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A shard that is done.

  Attributes:
    name: of its file.
    num_taken: items of the source that went into it, unreadable ones included.
    keys: of its records.
    labels: of its records.
    lengths: of its records' data, bytes.
    digests: of what its records hold.
    unreadable: why items were left out.
  """

  name: str
  num_taken: int
  keys: Sequence[str]
  labels: Sequence[str]
  lengths: Sequence[int]
  digests: Sequence[int]
  unreadable: Sequence[str]

  def index(self, folder: str) -> ShardIndex:
    """Its part of the index, of the file as it lies in a folder."""
    lengths = np.array(self.lengths, np.int64)
    ends = np.cumsum(lengths + framing.OVERHEAD_BYTES)
    labels = Labels()
    numbers = labels.numbers_of(self.labels)
    return ShardIndex(
      shard=manifest.describe_shard(folder, self.name, len(lengths)),
      offsets=ends - lengths - framing.OVERHEAD_BYTES,
      lengths=lengths.astype(np.uint32),
      labels=numbers,
      label_names=labels.names,
    )


def write(folder: str, name: str, records: Iterable[Prepared | Unreadable]) -> Part:
  """Writes a shard, and then a note that it is whole.

  Args:
    folder: where.
    name: of the shard's file.
    records: those to write, and those that are left out; one is held at a time.

  Returns:
    What the note says.

  Raises:
    OSError: it can't be written.
  """
  kept: list[tuple[str, str, int, int]] = []
  unreadable: list[str] = []

  def frames() -> Iterator[bytes]:
    for record in records:
      if isinstance(record, Unreadable):
        unreadable.append(record.reason)
        continue
      kept.append((record.key, record.label, len(record.data), record.digest))
      yield framing.frame(record.data)

  paths.write_parts(os.path.join(folder, name), frames())
  part = Part(
    name=name,
    num_taken=len(kept) + len(unreadable),
    keys=[key for key, *_ in kept],
    labels=[label for _, label, *_ in kept],
    lengths=[length for *_, length, _ in kept],
    digests=[digest for *_, digest in kept],
    unreadable=unreadable,
  )
  note = os.path.join(folder, name + _ENDING)
  content = json.dumps(dataclasses.asdict(part)).encode()
  paths.replace_file(note, content)
  return part


def read_parts(folder: str) -> list[Part]:
  """What the notes in a folder say, in the order of the shards."""
  names = [name for name in paths.list_folder(folder) if name.endswith(_ENDING)]
  contents = (paths.read_bytes(os.path.join(folder, name)) for name in names)
  return [Part(**json.loads(content)) for content in contents]
