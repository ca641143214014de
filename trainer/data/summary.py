"""What a data set holds: classes, records, duplicates, and what was left out."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from trainer.data import paths
from trainer.data.records import RecordIndex
from trainer.data.shard_file import Part

FILE_NAME = "summary.json"
_NUM_NAMES = 5
_WHOLE_NUMBER = re.compile(r"([+-]?)0*(\d+)(\.0*)?")
# What pandas, spreadsheets and databases write for a value that is missing.
_MISSING = ("nan", "none", "null", "na", "n/a", "<na>", "nat", "#n/a")


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a data set holds.

  Attributes:
    num_records: records.
    num_classes: classes that have any.
    smallest_class: name and number of records.
    largest_class: name and number of records.
    num_duplicates: records with the same content as an earlier one.
    num_duplicates_of_other_class: those of them whose class is another.
    duplicates: keys of some that are alike, each with the earlier one's.
    unreadable: why items were left out.
    num_repeated_keys: records with the key of an earlier one.
    num_repeated_keys_of_other_class: those of them whose class is another.
    repeated_keys: some such keys, each with the classes of both records.
    similar_classes: some pairs of class names that differ in their spelling alone.
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
    """Records, classes and the ends of their sizes."""
    smallest, largest = self.smallest_class, self.largest_class
    return (
      f"{self.num_records} records of {self.num_classes} classes, from {smallest[1]} "
      f"({smallest[0]}) to {largest[1]} ({largest[0]}) a class."
    )

  def warnings(self) -> list[str]:
    """Lines on what is likely a fault of the data; none where there is none."""
    lines = [*self._warnings_on_classes(), *self._warnings_on_keys()]
    if self.num_duplicates:
      shown = "; ".join(f"{again} = {first}" for first, again in self.duplicates)
      lines.append(
        f"{self.num_duplicates} records have the content of an earlier one, "
        f"{self.num_duplicates_of_other_class} of them in another class: {shown}"
      )
    if self.unreadable:
      shown = " ".join(self.unreadable[:_NUM_NAMES])
      lines.append(f"{len(self.unreadable)} items were left out: {shown}")
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
        "Classes stay apart whose names differ only in case, blanks, accents' encoding "
        f"or the form of a number: {shown}"
      )
    if self.missing_classes:
      shown = ", ".join(map(repr, self.missing_classes))
      lines.append(f"A class has the name of a missing value: {shown}")
    return lines


def of_parts(parts: Sequence[Part]) -> Summary:
  """The summary of what was written, shard by shard."""
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
  """Records that have what an earlier one has.

  Args:
    records: what they have, their keys and their labels.

  Returns:
    Key and label of the first, and of the later one; those of different classes come
    first, as they teach what is wrong.
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
  """Pairs of names that a person may have meant to be one."""
  first_of: dict[str, str] = {}
  pairs = []
  for name in sorted(names):
    first = first_of.setdefault(_plain(name), name)
    if first != name:
      pairs.append((first, name))
  return pairs


def _plain(name: str) -> str:
  """A name without case and blanks, and a whole number in its shortest form."""
  text = " ".join(unicodedata.normalize("NFC", name).casefold().split())
  return _WHOLE_NUMBER.sub(r"\1\2", text) if _WHOLE_NUMBER.fullmatch(text) else text


def of_index(index: RecordIndex) -> Summary:
  """The summary of an index."""
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


def write(index_folder: str, summary: Summary) -> None:
  """Writes `summary.json` into the folder of an index."""
  content = json.dumps(dataclasses.asdict(summary), indent=1, ensure_ascii=False)
  # A name that is no UTF-8 is shown escaped.
  encoded = content.encode(errors="backslashreplace")
  paths.write_bytes(os.path.join(index_folder, FILE_NAME), encoded)
