"""Writes items as TFRecord shards with their index, so that no half is taken for whole.

All is written into a folder aside. Then the shards are moved to their place, and last
the whole index, without which nothing reads them.
"""

from __future__ import annotations

import collections
import errno
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import BinaryIO, Optional

import numpy as np
import tensorflow as tf

from trainer.data import framing, index_arrays, manifest, members
from trainer.data.class_names import ClassNames
from trainer.data.records import locate
from trainer.data.sources import Item
from trainer.errors import UserError

LABEL_FEATURE = "label"
_ASIDE = ".partial"
# EFBIG: a limit on the size of files. None: NumPy's short writes carry no number.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)


def write_records(
  items: Iterable[Item],
  folder: str,
  *,
  records_per_shard: int,
  fingerprint: Mapping[str, object],
) -> collections.Counter[str]:
  """Writes shards and index; one that is there already is replaced.

  Args:
    items: each is checked to decode.
    folder: made if it is missing.
    records_per_shard: the last shard may have fewer.
    fingerprint: of the source, to tell later whether it is the same.

  Returns:
    Number of records of each class.

  Raises:
    UserError: an image doesn't decode, there are not two classes, or the folder can't
      be written to.
  """
  folder, index_folder = locate(folder)
  aside = os.path.join(folder, _ASIDE)
  try:
    shutil.rmtree(aside, ignore_errors=True)  # What a killed ingest left.
    os.makedirs(os.path.join(aside, "index"))
    writer = _ShardWriter(aside, records_per_shard)
    for item in items:
      writer.write(item)
    writer.finish()
    counts = collections.Counter(writer.labels)
    if len(counts) < 2:
      raise UserError(
        f"The source has {len(counts)} class ({', '.join(counts)}); retrieval needs at "
        "least two."
      )
    _write_index(os.path.join(aside, "index"), writer, fingerprint)
    _publish(aside, folder, index_folder)
    return counts
  except OSError as error:
    raise UserError(_explain(error, folder)) from error
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: str, folder: str, index_folder: str) -> None:
  """Moves shards and then index to their place."""
  if os.path.exists(index_folder):
    shutil.rmtree(index_folder)
  for name in sorted(os.listdir(aside)):
    if name != "index":
      os.replace(os.path.join(aside, name), os.path.join(folder, name))
  os.replace(os.path.join(aside, "index"), index_folder)


class _ShardWriter:
  """Records in shards, with what the index must know of each."""

  def __init__(self, folder: str, records_per_shard: int):
    self._folder = folder
    self._records_per_shard = records_per_shard
    self._file: Optional[BinaryIO] = None
    self.labels: list[str] = []
    self.offsets: list[int] = []
    self.lengths: list[int] = []
    self.shards: list[manifest.Shard] = []

  def write(self, item: Item) -> None:
    """Appends a record."""
    _check_decodes(item)
    if len(self.labels) % self._records_per_shard == 0:
      self._next_shard()
    assert self._file is not None
    data = _example(item).SerializeToString(deterministic=True)
    self.offsets.append(self._file.tell())
    self.lengths.append(len(data))
    self.labels.append(item.label)
    self._file.write(framing.frame(data))

  def finish(self) -> None:
    """Closes the last shard."""
    if self._file is None:
      return
    self._file.flush()
    os.fsync(self._file.fileno())  # The index must not reach the disk before it.
    self._file.close()
    status = os.stat(self._file.name)
    num_before = sum(shard.num_records for shard in self.shards)
    self.shards.append(
      manifest.Shard(
        name=os.path.basename(self._file.name),
        num_bytes=status.st_size,
        num_records=len(self.labels) - num_before,
        modified_ns=status.st_mtime_ns,
      )
    )

  def _next_shard(self) -> None:
    self.finish()
    name = f"records-{len(self.shards):05}.tfrecord"
    path = os.path.join(self._folder, name)
    self._file = open(path, "wb")  # noqa: SIM115  Open until the next shard.


def _write_index(
  folder: str, writer: _ShardWriter, fingerprint: Mapping[str, object]
) -> None:
  class_names = sorted(set(writer.labels))
  ids = {name: class_id for class_id, name in enumerate(class_names)}
  labels = np.array([ids[label] for label in writer.labels], np.int32)
  table = members.from_labels(labels, len(class_names))
  names = ClassNames.of(class_names)
  counts = [shard.num_records for shard in writer.shards]
  arrays = index_arrays.IndexArrays(
    offsets=np.array(writer.offsets),
    lengths=np.array(writer.lengths),
    shards=np.repeat(np.arange(len(counts)), counts),
    labels=labels,
    member_records=table.records,
    member_starts=table.starts,
    name_text=names.text,
    name_starts=names.starts,
    name_hashes=names.hashes,
  )
  index_arrays.write(folder, arrays)
  manifest.write(
    folder,
    manifest.Manifest(
      shards=tuple(writer.shards),
      num_classes=len(class_names),
      label_feature=LABEL_FEATURE,
      source=fingerprint,
    ),
  )


def _example(item: Item) -> tf.train.Example:
  values = {
    "image": item.image,
    LABEL_FEATURE: item.label.encode(),
    "key": os.fsencode(item.key),
  }
  features = {
    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    for name, value in values.items()
  }
  return tf.train.Example(features=tf.train.Features(feature=features))


def _check_decodes(item: Item) -> None:
  try:
    tf.io.decode_image(item.image, expand_animations=False)
  except tf.errors.OpError as error:
    reason = re.sub(r"^{{.*?}} ?", "", error.message).splitlines()[0]
    raise UserError(
      f"{item.key} is no image that can be decoded ({len(item.image)} bytes): {reason}"
    ) from error


def _explain(error: OSError, folder: str) -> str:
  if error.errno in _NO_ROOM:
    return f"{folder}: the disk is full; free some space and run the ingest again."
  return f"{error.filename or folder} can't be written to: {error.strerror}."
