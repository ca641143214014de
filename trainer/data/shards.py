"""Shards written by ingest: files, publication and summary.

Existing files are replaced only if an earlier ingest wrote them; a user's own files are
never overwritten.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from trainer.data import indexing, manifest, tfrecord
from trainer.data.example_encoder import LABEL_FEATURE, EncodedExample
from trainer.data.indexing import LabelMapping, ShardIndex
from trainer.data.records import RecordIndex
from trainer.errors import UserError
from trainer.runtime import filesystem

_ENDING = ".part.json"

SUMMARY_FILE = "summary.json"
_NUM_NAMES = 5
_WHOLE_NUMBER = re.compile(r"([+-]?)0*(\d+)(\.0*)?")
# Texts that pandas, spreadsheets and databases write for a missing value.
_MISSING = ("nan", "none", "null", "na", "n/a", "<na>", "nat", "#n/a")


@dataclasses.dataclass(frozen=True)
class UnreadableItem:
  """An item that was skipped.

  Attributes:
    reason: message with the item's name and the reason.
  """

  reason: str


@dataclasses.dataclass(frozen=True)
class ShardPart:
  """A finished shard.

  Attributes:
    name: name of its file.
    num_taken: number of source items processed for it, including unreadable ones.
    keys: keys of its records.
    labels: labels of its records.
    lengths: lengths of its records' data, bytes.
    digests: digests of its records' content.
    unreadable: reasons why items were skipped.
  """

  name: str
  num_taken: int
  keys: Sequence[str]
  labels: Sequence[str]
  lengths: Sequence[int]
  digests: Sequence[int]
  unreadable: Sequence[str]

  def index(self, folder: str) -> ShardIndex:
    """Returns its part of the index, for its file in the given folder."""
    lengths = np.array(self.lengths, np.int64)
    ends = np.cumsum(lengths + tfrecord.OVERHEAD_BYTES)
    labels = LabelMapping()
    numbers = labels.numbers_of(self.labels)
    return ShardIndex(
      shard=manifest.describe_shard(folder, self.name, len(lengths)),
      offsets=ends - lengths - tfrecord.OVERHEAD_BYTES,
      lengths=lengths.astype(np.uint32),
      labels=numbers,
      label_names=labels.names,
    )


def write_shard(
  folder: str, name: str, records: Iterable[EncodedExample | UnreadableItem]
) -> ShardPart:
  """Writes a shard, and then a note that marks it as complete.

  Args:
    folder: folder of the shard.
    name: file name of the shard.
    records: records to write, and skipped items; one is held in memory at a time.

  Returns:
    The content of the note.

  Raises:
    OSError: it can't be written.
  """
  written: list[tuple[str, str, int, int]] = []
  unreadable: list[str] = []

  def frames() -> Iterator[bytes]:
    for record in records:
      if isinstance(record, UnreadableItem):
        unreadable.append(record.reason)
        continue
      written.append((record.key, record.label, len(record.data), record.digest))
      yield tfrecord.frame_record(record.data)

  filesystem.write_parts(os.path.join(folder, name), frames())
  part = ShardPart(
    name=name,
    num_taken=len(written) + len(unreadable),
    keys=[key for key, *_ in written],
    labels=[label for _, label, *_ in written],
    lengths=[length for *_, length, _ in written],
    digests=[digest for *_, digest in written],
    unreadable=unreadable,
  )
  note = os.path.join(folder, name + _ENDING)
  content = json.dumps(dataclasses.asdict(part)).encode()
  filesystem.replace_file(note, content)
  return part


def read_shard_parts(folder: str) -> list[ShardPart]:
  """Reads the notes in a folder, in the order of the shards."""
  names = [name for name in filesystem.list_folder(folder) if name.endswith(_ENDING)]
  contents = (filesystem.read_bytes(os.path.join(folder, name)) for name in names)
  return [ShardPart(**json.loads(content)) for content in contents]


def unpublish_shards(staging_dir: str) -> list[ShardPart]:
  """Moves shards that a killed run had published back to the staging folder.

  Args:
    staging_dir: the staging folder, inside the final folder of the shards.

  Returns:
    The finished shards, according to their notes.
  """
  parts = read_shard_parts(staging_dir)
  for part in parts:
    staged = os.path.join(staging_dir, part.name)
    published = os.path.join(os.path.dirname(staging_dir), part.name)
    if not filesystem.exists(staged) and filesystem.exists(published):
      filesystem.move(published, staged)
  return parts


def discard_shards(staging_dir: str) -> None:
  """Removes everything that a failed ingest wrote, published or not."""
  with contextlib.suppress(OSError):
    unpublish_shards(staging_dir)
  filesystem.remove_folder(staging_dir)


def check_names_free(folder: str, index_folder: str, names: Iterable[str]) -> None:
  """Checks that no file of the user would be overwritten.

  Args:
    folder: folder of the shards.
    index_folder: folder of their index.
    names: file names of the shards to be written.

  Raises:
    UserError: such a file exists, and no known ingest wrote it.
  """
  replaceable = manifest.ingested_names(index_folder)
  for name in names:
    path = os.path.join(folder, name)
    if name not in replaceable and filesystem.exists(path):
      raise UserError(
        f"{path} already exists and was not written by this ingest; choose another "
        "ingest.folder, or move the file away."
      )


def publish_shards(
  parts: Sequence[ShardPart],
  staging_dir: str,
  folder: str,
  index_folder: str,
  fingerprint: Mapping[str, object],
) -> None:
  """Moves shards into place, then index and summary.

  Args:
    parts: the shards.
    staging_dir: the staging folder.
    folder: final folder of the shards.
    index_folder: final folder of the index.
    fingerprint: fingerprint of the source.

  Raises:
    UserError: a file of the user is in the way.
    OSError: a file can't be written.
  """
  check_names_free(folder, index_folder, [part.name for part in parts])
  index_staging_dir = os.path.join(staging_dir, "index")
  filesystem.remove_folder(index_staging_dir)
  filesystem.make_folder(index_staging_dir)
  write_summary(index_staging_dir, summary_of_parts(parts))
  indexing.write_index(
    index_staging_dir,
    [part.index(staging_dir) for part in parts],
    label_feature=LABEL_FEATURE,
    source=fingerprint,
  )
  manifest.retire(index_folder)
  for part in parts:
    filesystem.move(
      os.path.join(staging_dir, part.name), os.path.join(folder, part.name)
    )
  indexing.publish_index(index_staging_dir, index_folder)


@dataclasses.dataclass(frozen=True)
class Summary:
  """Summary of a data set.

  Attributes:
    num_records: number of records.
    num_classes: number of classes with records.
    smallest_class: name and number of records.
    largest_class: name and number of records.
    num_duplicates: records with the same content as an earlier one.
    num_duplicates_of_other_class: those of them in another class.
    duplicates: keys of some duplicates, each with the key of the earlier record.
    unreadable: reasons why items were skipped.
    num_repeated_keys: records with the key of an earlier one.
    num_repeated_keys_of_other_class: those of them in another class.
    repeated_keys: some such keys, each with the classes of both records.
    similar_classes: some pairs of class names that differ only in spelling.
    missing_classes: class names that are the text of a missing value.
  """

  num_records: int
  num_classes: int
  smallest_class: tuple[str, int]
  largest_class: tuple[str, int]
  num_duplicates: int = 0
  num_duplicates_of_other_class: int = 0
  duplicates: Sequence[tuple[str, str]] = ()
  unreadable: Sequence[str] = ()
  num_repeated_keys: int = 0
  num_repeated_keys_of_other_class: int = 0
  repeated_keys: Sequence[tuple[str, str, str]] = ()
  similar_classes: Sequence[tuple[str, str]] = ()
  missing_classes: Sequence[str] = ()

  def line(self) -> str:
    """Returns the numbers of records and classes, and the extreme class sizes."""
    smallest, largest = self.smallest_class, self.largest_class
    return (
      f"{self.num_records} records of {self.num_classes} classes, {smallest[1]} "
      f"({smallest[0]}) to {largest[1]} ({largest[0]}) per class."
    )

  def warnings(self) -> list[str]:
    """Returns messages about likely faults of the data; empty if there are none."""
    lines = [*self._warnings_on_classes(), *self._warnings_on_keys()]
    if self.num_duplicates:
      shown = "; ".join(f"{again} = {first}" for first, again in self.duplicates)
      lines.append(
        f"{self.num_duplicates} records have the content of an earlier one, "
        f"{self.num_duplicates_of_other_class} of them in another class: {shown}"
      )
    if self.unreadable:
      shown = " ".join(self.unreadable[:_NUM_NAMES])
      lines.append(f"{len(self.unreadable)} items were skipped: {shown}")
    return lines

  def _warnings_on_keys(self) -> list[str]:
    if not self.num_repeated_keys:
      return []
    shown = "; ".join(
      key if first == label else f"{key} ({first}, {label})"
      for key, first, label in self.repeated_keys
    )
    return [
      f"{self.num_repeated_keys} records have the key of an earlier one, "
      f"{self.num_repeated_keys_of_other_class} of them in another class: {shown}"
    ]

  def _warnings_on_classes(self) -> list[str]:
    lines = []
    if self.similar_classes:
      shown = "; ".join(f"{a!r} and {b!r}" for a, b in self.similar_classes)
      lines.append(
        "Some classes have names that differ only in case, blanks, accents' encoding "
        f"or the form of a number, and remain separate: {shown}"
      )
    if self.missing_classes:
      shown = ", ".join(map(repr, self.missing_classes))
      lines.append(f"A class is named like a missing value: {shown}")
    return lines


def summary_of_parts(parts: Sequence[ShardPart]) -> Summary:
  """Returns the summary of the written shards."""
  sizes = collections.Counter(label for part in parts for label in part.labels)
  alike = _repeated(
    (digest, key, label)
    for part in parts
    for digest, key, label in zip(part.digests, part.keys, part.labels)
  )
  repeated = _repeated(
    (key, key, label) for part in parts for key, label in zip(part.keys, part.labels)
  )
  largest, *_, smallest = sizes.most_common()
  return Summary(
    num_records=sum(sizes.values()),
    num_classes=len(sizes),
    smallest_class=smallest,
    largest_class=largest,
    num_duplicates=len(alike),
    num_duplicates_of_other_class=sum(a != b for (_, a), (_, b) in alike),
    duplicates=[(first, again) for (first, _), (again, _) in alike[:_NUM_NAMES]],
    unreadable=[reason for part in parts for reason in part.unreadable],
    num_repeated_keys=len(repeated),
    num_repeated_keys_of_other_class=sum(a != b for (_, a), (_, b) in repeated),
    repeated_keys=[(key, a, b) for (key, a), (_, b) in repeated[:_NUM_NAMES]],
    similar_classes=_similar(sizes)[:_NUM_NAMES],
    missing_classes=[name for name in sorted(sizes) if name.lower() in _MISSING],
  )


def _repeated(
  records: Iterable[tuple[Hashable, str, str]],
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
  """Finds records whose value equals that of an earlier one.

  Args:
    records: value, key and label of each record.

  Returns:
    Key and label of the first and of the later record. Pairs of different classes come
    first, because they are the most informative.
  """
  first_of: dict[Hashable, tuple[str, str]] = {}
  repeated = []
  for value, *names in records:
    record = (names[0], names[1])
    first = first_of.setdefault(value, record)
    if first is not record:
      repeated.append((first, record))
  return sorted(repeated, key=lambda pair: pair[0][1] == pair[1][1])


def _similar(names: Iterable[str]) -> list[tuple[str, str]]:
  """Returns pairs of names that are probably meant to be the same."""
  first_of: dict[str, str] = {}
  pairs = []
  for name in sorted(names):
    first = first_of.setdefault(_normalize(name), name)
    if first != name:
      pairs.append((first, name))
  return pairs


def _normalize(name: str) -> str:
  """Normalizes case and blanks of a name, and the form of a whole number."""
  text = " ".join(unicodedata.normalize("NFC", name).casefold().split())
  return _WHOLE_NUMBER.sub(r"\1\2", text) if _WHOLE_NUMBER.fullmatch(text) else text


def summary_of_index(index: RecordIndex) -> Summary:
  """Returns the summary of an index."""
  sizes = np.diff(index.member_table.starts)
  drawn = np.flatnonzero(sizes)
  smallest = int(drawn[np.argmin(sizes[drawn])])
  largest = int(np.argmax(sizes))
  return Summary(
    num_records=index.num_records,
    num_classes=len(drawn),
    smallest_class=(index.class_names[smallest], int(sizes[smallest])),
    largest_class=(index.class_names[largest], int(sizes[largest])),
  )


def write_summary(index_folder: str, summary: Summary) -> None:
  """Writes `summary.json` into the folder of an index."""
  content = json.dumps(dataclasses.asdict(summary), indent=1, ensure_ascii=False)
  # Names that are not UTF-8 are escaped.
  encoded = content.encode(errors="backslashreplace")
  filesystem.write_bytes(os.path.join(index_folder, SUMMARY_FILE), encoded)
