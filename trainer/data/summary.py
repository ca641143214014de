"""What a data set holds: classes, records, duplicates, and what was left out."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np

from trainer.data import paths
from trainer.data.records import RecordIndex
from trainer.data.shard_file import Part

FILE_NAME = "summary.json"
_NUM_NAMES = 5


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
  """

  num_records: int
  num_classes: int
  smallest_class: tuple[str, int]
  largest_class: tuple[str, int]
  num_duplicates: int = 0
  num_duplicates_of_other_class: int = 0
  duplicates: Sequence[tuple[str, str]] = ()
  unreadable: Sequence[str] = ()

  def line(self) -> str:
    """Records, classes and the ends of their sizes."""
    smallest, largest = self.smallest_class, self.largest_class
    return (
      f"{self.num_records} records of {self.num_classes} classes, from {smallest[1]} "
      f"({smallest[0]}) to {largest[1]} ({largest[0]}) a class."
    )

  def warnings(self) -> list[str]:
    """Lines on duplicates and on what was left out; none where there are none."""
    lines = []
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


def of_parts(parts: Sequence[Part]) -> Summary:
  """The summary of what was written, shard by shard."""
  sizes = collections.Counter(label for part in parts for label in part.labels)
  first_of: dict[int, tuple[str, str]] = {}
  alike = []
  for part in parts:
    for digest, key, label in zip(part.digests, part.keys, part.labels):
      first_key, first_label = first_of.setdefault(digest, (key, label))
      if first_key != key:
        alike.append((first_key, key, first_label != label))
  # Those of different classes first: they teach what is wrong.
  alike.sort(key=lambda each: not each[2])
  largest, *_, smallest = sizes.most_common()
  return Summary(
    num_records=sum(sizes.values()),
    num_classes=len(sizes),
    smallest_class=smallest,
    largest_class=largest,
    num_duplicates=len(alike),
    num_duplicates_of_other_class=sum(is_other for *_, is_other in alike),
    duplicates=[(first, again) for first, again, _ in alike[:_NUM_NAMES]],
    unreadable=[reason for part in parts for reason in part.unreadable],
  )


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
