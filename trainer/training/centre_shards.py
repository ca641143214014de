"""The rows of class centres in checkpoints: a file for each part of the classes.

Every worker writes the rows of its replicas, with their optimizer state, in the order
of the classes. The chief waits for all files of a step before it publishes the
checkpoint. The files do not depend on each other, so that any number of replicas reads
the rows it needs.

Shapes: C classes, n of them in a file, m moments, k centres of a class, D dimensions.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
from absl import logging

from trainer.errors import UserError, short_reason
from trainer.losses.class_centres import ClassCentres
from trainer.runtime import filesystem

# Rows of a table, and which of its classes were in a batch.
_ROWS = re.compile(
  r"ckpt-(?P<step>\d{1,18})\.(?P<kind>centres|seen)-(?P<table>\d{1,3})"
  r"-(?P<first>\d{10})-(?P<last>\d{10})\.npy"
)
_KINDS = ("centres", "seen")
_TOKEN = "save"
_CLASSES = re.compile(r"ckpt-(\d{1,18})\.classes\.npy")
_WAIT_S, _DEADLINE_S, _DEADLINE_OF_END_S = 0.05, 600.0, 10.0


class Rows(NamedTuple):
  """Rows copied to the host.

  Attributes:
    name: of their file.
    values: [n, 1 + m, k·D] float32, centres and moments; [n] bool, whether a class was
      in a batch; or [C] uint64, hashes of the names of all classes.
  """

  name: str
  values: np.ndarray


def is_shard(name: str) -> bool:
  """Returns whether a file name is that of rows or of the names of classes."""
  return bool(_ROWS.fullmatch(name) or _CLASSES.fullmatch(name))


def shard_names(step: int, tables: Sequence[ClassCentres]) -> list[str]:
  """Returns the names of all files of a step, on all workers.

  Args:
    step: number of steps done.
    tables: their variables exist.
  """
  names = [
    _name(step, kind, number, first, last)
    for number, table in enumerate(tables)
    for first, last in table.ranges
    for kind in _KINDS
  ]
  return [*names, f"ckpt-{step}.classes.npy"] if tables else []


def copy_rows(step: int, tables: Sequence[ClassCentres], is_chief: bool) -> list[Rows]:
  """Copies the rows of this worker's replicas to the host.

  Args:
    step: number of steps done.
    tables: their variables exist.
    is_chief: whether this worker also writes the names of the classes.
  """
  rows = [
    Rows(_name(step, kind, number, first, first + len(values)), values)
    for number, table in enumerate(tables)
    for kind, parts in zip(_KINDS, (table.local_rows(), table.local_seen()))
    for first, values in parts
  ]
  if tables and is_chief:
    rows.append(Rows(f"ckpt-{step}.classes.npy", tables[0].name_hashes))
  return rows


def write_rows(folder: str, rows: Sequence[Rows], token: str) -> None:
  """Writes each file, and then its size and hash beside it.

  Args:
    folder: of the checkpoints; it exists.
    rows: of this worker.
    token: of this save, so that files of another one are not taken for its own.

  Raises:
    OSError: a file cannot be written. An error file beside it informs the chief.
  """
  paths = [os.path.join(folder, each.name) for each in rows]
  try:
    for path, each in zip(paths, rows):
      with filesystem.replacing(path) as staged:
        filesystem.write_parts(staged, _npy_parts(each.values))
      filesystem.replace_file(
        _facts_path(path), json.dumps({**facts(path), _TOKEN: token})
      )
  except OSError as error:
    _remove(paths)  # So that there is room for the error.
    for path in paths:
      filesystem.replace_file(
        _facts_path(path),
        json.dumps(
          {"error": f"{error.filename}: {short_reason(error)}", _TOKEN: token}
        ),
      )
    raise


def _npy_parts(values: np.ndarray) -> list[Any]:
  """Returns header and data of a file of NumPy; its own writer hides a full disk."""
  header = io.BytesIO()
  description = np.lib.format.header_data_from_array_1_0(values)
  np.lib.format.write_array_header_1_0(header, description)
  return [header.getvalue(), np.ascontiguousarray(values).data]


def collect_facts(
  folder: str,
  names: Sequence[str],
  token: str,
  is_ending: Optional[threading.Event] = None,
) -> dict[str, Any]:
  """Waits for the files of all workers, and returns their sizes and hashes by name.

  Args:
    folder: of the checkpoints.
    names: of all files.
    token: of this save.
    is_ending: set when the run fails; files are then awaited for seconds only.

  Raises:
    OSError: a worker could not write its file, or the time to wait is over.
  """
  found: dict[str, Any] = {}
  start = time.monotonic()
  for name in names:
    path = _facts_path(os.path.join(folder, name))
    while (read := _read_facts(path, token)) is None:
      is_short = is_ending is not None and is_ending.is_set()
      deadline_s = _DEADLINE_OF_END_S if is_short else _DEADLINE_S
      if time.monotonic() - start > deadline_s:
        raise OSError(f"{name} was not written by its worker in {deadline_s:.0f} s")
      time.sleep(_WAIT_S)
    found[name] = read
    if "error" in read:
      raise OSError(read["error"])
  _remove([_facts_path(os.path.join(folder, name)) for name in names])
  return found


def _read_facts(path: str, token: str) -> Optional[dict[str, Any]]:
  """Returns the facts of a save; None until its worker has written them."""
  try:
    with open(path, encoding="utf-8") as file:
      read = json.load(file)
  except (FileNotFoundError, ValueError):
    return None
  return read if read.pop(_TOKEN, None) == token else None


def facts(path: str) -> dict[str, Any]:
  """Returns size and SHA-256 of a file, as in a manifest."""
  return {"bytes": os.path.getsize(path), "sha256": filesystem.sha256_of(path)}


def remove_unpublished(folder: str, published: Sequence[int]) -> None:
  """Removes files of steps that have no manifest: their process was killed.

  Args:
    folder: of the checkpoints.
    published: steps that have a manifest.
  """
  if not os.path.isdir(folder):
    return
  for name in os.listdir(folder):
    match = re.match(r"ckpt-(\d{1,18})\.(centres-|seen-|classes)", name)
    is_left = match and int(match[1]) not in published
    if is_left or (match and name.endswith(".json")):
      os.remove(os.path.join(folder, name))


def remove_step(folder: str, step: int) -> None:
  """Removes the files of a step that could not be saved, to free the disk.

  Only the chief may call this: it reads the errors of the other workers.

  Args:
    folder: of the checkpoints.
    step: not published.
  """
  if os.path.isdir(folder):
    pattern = re.compile(rf"ckpt-{step}\.(centres-|seen-|classes)")
    names = filter(pattern.match, os.listdir(folder))
    _remove([os.path.join(folder, name) for name in names])


def _remove(paths: Sequence[str]) -> None:
  for path in paths:
    with contextlib.suppress(OSError):
      os.remove(path)


def restore_rows(
  folder: str,
  files: Mapping[str, Any],
  tables: Sequence[ClassCentres],
  *,
  allows_other_classes: bool = False,
) -> np.ndarray:
  """Assigns the saved rows of each replica of this worker.

  Classes are known by their names. Rows of classes that are no longer in the data are
  left out, and new classes get their initial values.

  Args:
    folder: of the checkpoints.
    files: names and facts of the files of a valid checkpoint.
    tables: their variables exist.
    allows_other_classes: whether the data may have other classes than the checkpoint.

  Returns:
    [n] int64, places of the new classes among those of the data.

  Raises:
    UserError: the checkpoint has other tables, or other classes and may not.
  """
  saved, seen = (saved_rows(folder, files, kind) for kind in _KINDS)
  if len(saved) != len(tables):
    raise UserError(
      f"the checkpoint has {len(saved)} tables of class centres, and the loss of this "
      f"configuration has {len(tables)}; take another --model_dir."
    )
  new = np.empty(0, np.int64)
  if not tables:
    return new
  hashes = saved_classes(folder, files)
  sources = saved_numbers(hashes, tables[0].name_hashes)
  if not np.array_equal(hashes, tables[0].name_hashes):
    new = np.flatnonzero(sources < 0)
    _report_other_classes(sources, len(hashes), allows_other_classes)
  for rows, is_seen, table in zip(saved, seen, tables):
    table.check_row_shape(rows.shape)
    table.assign_rows(_Reader(rows, sources, table.initial_rows).read)
    table.assign_seen(_Reader(is_seen, sources, _initially_seen).read)
  return new


def _initially_seen(first: int, last: int) -> np.ndarray:
  return np.zeros(last - first, bool)


def saved_classes(folder: str, files: Mapping[str, Any]) -> np.ndarray:
  """Returns the hashes of the names of the classes of a checkpoint, [C] uint64.

  Args:
    folder: of the checkpoints.
    files: names of the files of a valid checkpoint that has class centres.
  """
  [name] = [name for name in files if _CLASSES.fullmatch(name)]
  return np.load(os.path.join(folder, name), allow_pickle=False)


def saved_rows(
  folder: str, files: Mapping[str, Any], kind: str = "centres"
) -> list[SavedRows]:
  """Returns the rows of each table in a checkpoint.

  Args:
    folder: of the checkpoints.
    files: names of the files of a valid checkpoint.
    kind: "centres", or "seen".
  """
  ranges: dict[int, list[tuple[int, int, str]]] = {}
  for match in filter(None, map(_ROWS.fullmatch, files)):
    if match["kind"] == kind:
      place = (int(match["first"]), int(match["last"]), os.path.join(folder, match[0]))
      ranges.setdefault(int(match["table"]), []).append(place)
  return [SavedRows(sorted(ranges[number])) for number in sorted(ranges)]


class SavedRows:
  """The rows of one table in a checkpoint, memory-mapped.

  Attributes:
    shape: (1 + m, k·D), of a row; () for whether classes were seen.

  Args:
    ranges: first and last class, exclusive, and path of each file, ascending.

  Raises:
    UserError: a file is not an array.
  """

  def __init__(self, ranges: Sequence[tuple[int, int, str]]):
    self._ranges = [(first, last, _mapped(path)) for first, last, path in ranges]
    self.shape = self._ranges[0][2].shape[1:]

  def read(self, numbers: np.ndarray) -> np.ndarray:
    """Returns [n, 1 + m, k·D] float32, or [n] bool.

    Args:
      numbers: [n] of classes among the saved ones.

    Raises:
      UserError: no file has some of these classes.
    """
    rows = np.empty([len(numbers), *self.shape], self._ranges[0][2].dtype)
    is_read = np.zeros(len(numbers), bool)
    for first, last, saved in self._ranges:
      is_here = (numbers >= first) & (numbers < last)
      rows[is_here] = saved[numbers[is_here] - first]
      is_read |= is_here
    if not is_read.all():
      raise UserError(
        f"the checkpoint has no centre of class {numbers[~is_read][0]}; remove it."
      )
    return rows


def _mapped(path: str) -> np.ndarray:
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception as error:  # Python's parser of the header raises many types.
    raise UserError(f"{path} is not an array: {short_reason(error)}.") from error


def saved_numbers(saved: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Returns each wanted class's number among the saved ones; −1 if it is new.

  Args:
    saved: [C] uint64, hashes of names.
    wanted: [n] uint64.

  Returns:
    [n] int64.
  """
  order = np.argsort(saved, kind="stable")
  places = np.minimum(np.searchsorted(saved, wanted, sorter=order), len(saved) - 1)
  found = order[places]
  return np.where(saved[found] == wanted, found, -1)


def _report_other_classes(
  sources: np.ndarray, num_saved: int, is_allowed: bool
) -> None:
  num_kept = int((sources >= 0).sum())
  text = (
    f"the checkpoint has centres of {num_saved} classes, and the training data has "
    f"{len(sources)}: {num_kept} are kept, {num_saved - num_kept} dropped and "
    f"{len(sources) - num_kept} new"
  )
  if num_kept == num_saved == len(sources):
    text = f"the checkpoint has the centres of the {num_kept} classes in another order"
  if not is_allowed:
    raise UserError(
      f"{text}; to train with these classes, set --allow_config_change, and repeat it "
      "until the next checkpoint is saved."
    )
  logging.warning("%s.", text)


class _Reader:
  """Reads rows of the classes of a table, and starts those that are new.

  Args:
    saved: rows of the checkpoint.
    sources: [C] int64, number of each class among the saved ones; −1 if new.
    initial_fn: gives the rows of new classes, from the first and the last, exclusive.
  """

  def __init__(
    self,
    saved: SavedRows,
    sources: np.ndarray,
    initial_fn: Callable[[int, int], np.ndarray],
  ):
    self._saved = saved
    self._sources = sources
    self._initial_fn = initial_fn

  def read(self, first: int, last: int) -> np.ndarray:
    """Returns [last − first, 1 + m, k·D] float32, or [last − first] bool.

    Raises:
      UserError: no file has some of these classes.
    """
    sources = self._sources[first:last]
    is_saved = sources >= 0
    if is_saved.all():
      return self._saved.read(sources)
    rows = self._initial_fn(first, last)
    rows[is_saved] = self._saved.read(sources[is_saved])
    return rows


def _name(step: int, kind: str, table: int, first: int, last: int) -> str:
  return f"ckpt-{step}.{kind}-{table}-{first:010}-{last:010}.npy"


def _facts_path(path: str) -> str:
  return f"{path}.json"
