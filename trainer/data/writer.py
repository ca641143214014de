"""Writes items as TFRecord shards with their index, so that no half is taken for whole.

All is written into a folder aside. Then the shards are moved to their place, and last
the whole index, without which nothing reads them. What a killed run left aside is gone
on from: shards that were finished are not made again.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from typing import Callable, Optional, TypeVar

from absl import logging

from trainer.data import index_builder, paths, shard_file
from trainer.data.prepare import LABEL_FEATURE, Prepared, Preparer
from trainer.data.progress import Progress
from trainer.data.records import locate
from trainer.data.shard_file import Part, Unreadable
from trainer.data.sources import Item, ItemLoader, Loader
from trainer.errors import UserError

_ASIDE = ".partial"
_MAX_PIXELS = 100_000_000
_ITEMS_AHEAD = 256
# EFBIG: a limit on the size of files. None: NumPy's short writes carry no number.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def write_records(
  items: Iterable[Item],
  folder: str,
  *,
  records_per_shard: int,
  fingerprint: Mapping[str, object],
) -> collections.Counter[str]:
  """Writes items that are loaded already; all must be readable.

  Args:
    items: each is checked to decode.
    folder: made if it is missing.
    records_per_shard: the last shard may have fewer.
    fingerprint: of the source, to tell later whether it is the same.

  Returns:
    Number of records of each class.

  Raises:
    UserError: as `RecordWriter.write`.
  """
  writer = RecordWriter(
    Preparer(max_pixels=_MAX_PIXELS), records_per_shard=records_per_shard
  )
  parts = writer.write(map(ItemLoader, items), folder, fingerprint)
  return collections.Counter(label for part in parts for label in part.labels)


class RecordWriter:
  """Loads, prepares and writes items, some side by side, in their order.

  Args:
    preparer: makes records of items.
    records_per_shard: items that go into a shard; the last may have fewer.
    leave_out_unreadable: whether an item that can't be read is left out and noted,
      and not the end.
    num_threads: items at once; None for as many as there are cores.
  """

  def __init__(
    self,
    preparer: Preparer,
    *,
    records_per_shard: int,
    leave_out_unreadable: bool = False,
    num_threads: Optional[int] = None,
  ):
    self._preparer = preparer
    self._records_per_shard = records_per_shard
    self._leave_out_unreadable = leave_out_unreadable
    self._num_threads = num_threads or os.cpu_count() or 1

  def write(
    self, loaders: Iterable[Loader], folder: str, fingerprint: Mapping[str, object]
  ) -> list[Part]:
    """Writes shards and index; one that is there already is replaced.

    Args:
      loaders: give the items, always in the same order.
      folder: made if it is missing.
      fingerprint: of the source.

    Returns:
      What was written, shard by shard.

    Raises:
      UserError: an item can't be read or kept, there are not two classes, the folder
        can't be written to, or another process writes into it.
    """
    folder, index_folder = locate(folder)
    aside = os.path.join(folder, _ASIDE)
    try:
      paths.make_folder(folder)
      with _alone_in(folder):
        try:
          parts = self._write_shards(loaders, aside, fingerprint)
          _check_classes(parts)
          _publish(parts, aside, folder, index_folder, fingerprint)
        except (OSError, UserError):
          paths.remove_folder(aside)
          raise
        paths.remove_folder(aside)
    except OSError as error:
      raise UserError(_explain(error, folder)) from error
    return parts

  def _write_shards(
    self, loaders: Iterable[Loader], aside: str, fingerprint: Mapping[str, object]
  ) -> list[Part]:
    parts = _resume(aside, fingerprint)
    num_done = sum(part.num_taken for part in parts)
    rest = itertools.islice(loaders, num_done, None)
    progress = Progress("ingesting", "items")
    with futures.ThreadPoolExecutor(self._num_threads) as threads:
      records = _in_order(threads, self._prepare, rest)
      while shard := list(itertools.islice(records, self._records_per_shard)):
        name = f"records-{len(parts):05}.tfrecord"
        parts.append(shard_file.write(aside, name, shard))
        progress.advance(len(shard))
    progress.finish()
    return parts

  def _prepare(self, load: Loader) -> Prepared | Unreadable:
    try:
      return self._preparer(load())
    except UserError as error:
      if not self._leave_out_unreadable:
        raise
      logging.warning("%s Left out.", error)
      return Unreadable(str(error))


def _in_order(
  threads: futures.Executor, work_fn: Callable[[_In], _Out], inputs: Iterable[_In]
) -> Iterator[_Out]:
  """As `map`, but takes few inputs ahead."""
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


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
  """Keeps other processes of this machine from writing into a folder.

  Raises:
    UserError: one does.
  """
  if paths.is_remote(folder):
    yield
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"Another process is ingesting into {folder}; wait for it, or choose another "
        "folder."
      ) from error
    except OSError as error:  # Some network file systems lock no folders.
      logging.warning("%s can't be locked: %s.", folder, error.strerror)
    yield
  finally:
    os.close(descriptor)


def _resume(aside: str, fingerprint: Mapping[str, object]) -> list[Part]:
  """The shards that a killed run of the same source finished; otherwise starts anew."""
  note = os.path.join(aside, "fingerprint.json")
  content = json.dumps(fingerprint, sort_keys=True, default=str).encode()
  if paths.exists(note) and paths.read_bytes(note) == content:
    parts = shard_file.read_parts(aside)
    for part in parts:
      moved = os.path.join(os.path.dirname(aside), part.name)
      if not paths.exists(os.path.join(aside, part.name)) and paths.exists(moved):
        paths.move(moved, os.path.join(aside, part.name))
    if parts:
      logging.info("Going on after %d shards that are finished.", len(parts))
    return parts
  paths.remove_folder(aside)
  paths.make_folder(aside)
  paths.write_bytes(note, content)
  return []


def _publish(
  parts: list[Part],
  aside: str,
  folder: str,
  index_folder: str,
  fingerprint: Mapping[str, object],
) -> None:
  """Moves shards and then index to their place."""
  index_aside = os.path.join(aside, "index")
  paths.remove_folder(index_aside)
  paths.make_folder(index_aside)
  index_builder.write_index(
    index_aside,
    [part.index(aside) for part in parts],
    label_feature=LABEL_FEATURE,
    source=fingerprint,
  )
  paths.remove_folder(index_folder)
  for part in parts:
    paths.move(os.path.join(aside, part.name), os.path.join(folder, part.name))
  index_builder.publish_index(index_aside, index_folder)


def _check_classes(parts: list[Part]) -> None:
  classes = sorted({label for part in parts for label in part.labels})
  if len(classes) < 2:
    raise UserError(
      f"The source has {len(classes)} class ({', '.join(classes)}); retrieval needs at "
      "least two."
    )


def _explain(error: OSError, folder: str) -> str:
  if error.errno in _NO_ROOM:
    return f"{folder}: the disk is full; free some space and run the ingest again."
  return f"{error.filename or folder} can't be written to: {error.strerror}."
