"""Writes items as TFRecord shards with their index, so that no half is taken for whole.

Shards and index arrays come first; the manifest, without which a folder has no index,
comes last.
"""

from __future__ import annotations

import collections
import errno
import os
from collections.abc import Iterable
from typing import BinaryIO, Optional

import numpy as np
import tensorflow as tf

from trainer.data import framing, index_arrays, manifest, members
from trainer.data.class_names import ClassNames
from trainer.data.records import locate
from trainer.data.sources import Item
from trainer.errors import UserError

LABEL_FEATURE = "label"


def write_records(
  items: Iterable[Item],
  folder: str,
  *,
  records_per_shard: int,
  fingerprint: dict[str, object],
) -> collections.Counter[str]:
  """Writes shards and index.

  Args:
    items: each is checked to decode.
    folder: made if it is missing.
    records_per_shard: the last shard may have fewer.
    fingerprint: of the source, to tell later whether it is the same.

  Returns:
    Number of records of each class.

  Raises:
    UserError: an image doesn't decode, there are not two classes, or the disk is full.
  """
  folder, index_folder = locate(folder)
  try:
    os.makedirs(index_folder, exist_ok=True)
    writer = _ShardWriter(folder, records_per_shard)
    for item in items:
      writer.write(item)
    writer.finish()
    counts = collections.Counter(writer.labels)
    if len(counts) < 2:
      raise UserError(
        f"The source has {len(counts)} class; retrieval needs at least two."
      )
    _write_index(index_folder, writer, fingerprint)
    return counts
  except OSError as error:
    raise UserError(_explain(error, folder)) from error


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
  folder: str, writer: _ShardWriter, fingerprint: dict[str, object]
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
    "key": item.key.encode(),
  }
  features = {
    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    for name, value in values.items()
  }
  return tf.train.Example(features=tf.train.Features(feature=features))


def _check_decodes(item: Item) -> None:
  try:
    tf.io.decode_image(item.image, expand_animations=False)
  except tf.errors.InvalidArgumentError as error:
    size = len(item.image)
    raise UserError(
      f"{item.key} is no image that can be decoded ({size} bytes): "
      f"{error.message.splitlines()[0]}"
    ) from error


def _explain(error: OSError, folder: str) -> str:
  if error.errno == errno.ENOSPC:
    return f"{folder}: the disk is full; free some space and run the ingest again."
  return f"{error.filename or folder} can't be written to: {error.strerror}."
