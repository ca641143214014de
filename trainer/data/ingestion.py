"""Writing of items as TFRecord shards with their index, atomically.

Everything is first written to a staging folder. Then the shards are moved into place,
and the complete index last; without an index nothing reads the shards. After a killed
run, ingest resumes from the staging folder and keeps finished shards.
"""

from __future__ import annotations

import collections
import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from typing import Callable, Optional, TypeVar

import tensorflow as tf
from absl import logging

from trainer.data import indexing, shards
from trainer.data.example_encoder import EncodedExample, ExampleEncoder
from trainer.data.records import locate_folder
from trainer.data.shards import ShardPart, UnreadableItem
from trainer.data.sources.source import Item, ItemLoader, Loader
from trainer.errors import UserError
from trainer.runtime import filesystem
from trainer.runtime.lease import locked_folder
from trainer.runtime.progress import Progress

_STAGING = ".partial"
_MAX_PIXELS = 100_000_000
_ITEMS_AHEAD = 256
# EFBIG: limit on file sizes. None: NumPy's short writes carry no error number.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def write_records(
  items: Iterable[Item],
  folder: str,
  *,
  records_per_shard: int,
  fingerprint: Mapping[str, object],
) -> collections.Counter[str]:
  """Writes items that are already loaded; all must be readable.

  Args:
    items: each is checked to decode.
    folder: created if missing.
    records_per_shard: the last shard may have fewer.
    fingerprint: fingerprint of the source, to detect changes later.

  Returns:
    Number of records of each class.

  Raises:
    UserError: as `RecordWriter.write`.
  """
  writer = RecordWriter(
    ExampleEncoder(max_pixels=_MAX_PIXELS), records_per_shard=records_per_shard
  )
  parts = writer.write(map(ItemLoader, items), folder, fingerprint)
  return collections.Counter(label for part in parts for label in part.labels)


class RecordWriter:
  """Loads, encodes and writes items in parallel, in their order.

  Args:
    encoder: encodes items as records.
    records_per_shard: items per shard; the last may have fewer.
    leave_out_unreadable: whether an item that can't be read is skipped and recorded
      instead of ending the ingest.
    num_threads: items in parallel; None for the number of cores.
  """

  def __init__(
    self,
    encoder: ExampleEncoder,
    *,
    records_per_shard: int,
    leave_out_unreadable: bool = False,
    num_threads: Optional[int] = None,
  ):
    self._encoder = encoder
    self._records_per_shard = records_per_shard
    self._leave_out_unreadable = leave_out_unreadable
    self._num_threads = num_threads or os.cpu_count() or 1

  def write(
    self,
    loaders: Iterable[Loader],
    folder: str,
    fingerprint: Mapping[str, object],
    *,
    num_items: Optional[int] = None,
  ) -> list[ShardPart]:
    """Writes shards and index; replaces those of an earlier ingest.

    Args:
      loaders: functions that load the items, always in the same order.
      folder: created if missing.
      fingerprint: fingerprint of the source.
      num_items: number of items, for the progress bar; None if unknown.

    Returns:
      Descriptions of the written shards.

    Raises:
      UserError: an item can't be read or stored, there are fewer than two classes, the
        folder can't be written to, a user's own file has the name of a shard, or
        another process writes into the folder.
    """
    folder, index_folder = locate_folder(folder)
    staging_dir = os.path.join(folder, _STAGING)
    try:
      filesystem.make_folder(folder)
      with locked_folder(folder, "ingesting into"):
        indexing.recover_index(index_folder)
        try:
          parts = _resume(staging_dir, fingerprint)
          shards.check_names_free(folder, index_folder, [_shard_name(0)])
          self._write_shards(loaders, staging_dir, parts, num_items)
          _check_classes(parts)
          shards.publish_shards(parts, staging_dir, folder, index_folder, fingerprint)
        except (OSError, UserError):
          shards.discard_shards(staging_dir)
          raise
        filesystem.remove_folder(staging_dir)
    except OSError as error:
      raise UserError(_explain(error, folder)) from error
    return parts

  def _write_shards(
    self,
    loaders: Iterable[Loader],
    staging_dir: str,
    parts: list[ShardPart],
    num_items: Optional[int],
  ) -> None:
    """Writes the shards after the existing parts, and appends their descriptions."""
    num_done = sum(part.num_taken for part in parts)
    rest = itertools.islice(loaders, num_done, None)
    progress = Progress("ingesting", "items", num_items, done=num_done)
    with futures.ThreadPoolExecutor(self._num_threads) as threads:
      records = _count_progress(
        _map_in_order(threads, self._encode_or_skip, rest), progress
      )
      for first in records:
        others = itertools.islice(records, self._records_per_shard - 1)
        shard = itertools.chain((first,), others)
        parts.append(shards.write_shard(staging_dir, _shard_name(len(parts)), shard))
    progress.finish()

  def _encode_or_skip(self, load: Loader) -> EncodedExample | UnreadableItem:
    try:
      return self._encode(load)
    except UserError as error:
      if not self._leave_out_unreadable:
        raise
      logging.warning("%s It is skipped.", error)
      return UnreadableItem(str(error))

  def _encode(self, load: Loader) -> EncodedExample:
    """Returns the record of an item; any fault of the item is a `UserError`."""
    key = "An item"
    try:
      item = load()
      key = item.key
      return self._encoder(item)
    except UserError:
      raise
    except (ValueError, tf.errors.OpError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise UserError(f"{key} can't be stored: {reason}") from error


def _shard_name(number: int) -> str:
  return f"records-{number:05}.tfrecord"


def _map_in_order(
  threads: futures.Executor, work_fn: Callable[[_In], _Out], inputs: Iterable[_In]
) -> Iterator[_Out]:
  """Maps a function over inputs in order, with a bounded number of inputs ahead."""
  waiting: collections.deque[futures.Future[_Out]] = collections.deque()
  try:
    for each in inputs:
      waiting.append(threads.submit(work_fn, each))
      if len(waiting) > _ITEMS_AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    for future in waiting:
      future.cancel()


def _count_progress(records: Iterable[_In], progress: Progress) -> Iterator[_In]:
  for record in records:
    yield record
    progress.advance(1)


def _resume(staging_dir: str, fingerprint: Mapping[str, object]) -> list[ShardPart]:
  """Returns the finished shards of a killed run of this source, or starts anew."""
  note = os.path.join(staging_dir, "fingerprint.json")
  content = json.dumps(fingerprint, sort_keys=True, default=str).encode()
  parts = shards.unpublish_shards(staging_dir) if filesystem.exists(staging_dir) else []
  if filesystem.exists(note) and filesystem.read_bytes(note) == content:
    if parts:
      logging.info("Resuming after %d finished shards.", len(parts))
    return parts
  filesystem.remove_folder(staging_dir)
  filesystem.make_folder(staging_dir)
  filesystem.write_bytes(note, content)
  return []


def _check_classes(parts: list[ShardPart]) -> None:
  classes = sorted({label for part in parts for label in part.labels})
  if len(classes) < 2:
    raise UserError(
      f"The source has {len(classes)} class ({', '.join(classes)}); retrieval needs at "
      "least two."
    )


def _explain(error: OSError, folder: str) -> str:
  if error.errno in _DISK_FULL:
    return f"{folder}: the disk is full; free some disk space and run the ingest again."
  return f"{error.filename or folder} can't be written: {error.strerror}."
