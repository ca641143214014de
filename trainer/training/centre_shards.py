"""The rows of class centres in checkpoints: a file for each part of the classes.

Every worker writes the rows of its replicas, with their optimizer state, in the order
of the classes. The chief waits for all files of a step before it publishes the
checkpoint. The files do not depend on each other, so that any number of replicas reads
the rows it needs.

Shapes: C classes, n of them in a file, m moments, k centres of a class, D dimensions.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import UserError
from trainer.losses.class_centres import ClassCentres
from trainer.runtime import filesystem

NAME = re.compile(r"ckpt-(\d{1,18})\.centres-(\d{1,3})-(\d{10})-(\d{10})\.npy")
_CLASSES = re.compile(r"ckpt-(\d{1,18})\.classes\.npy")
_WAIT_S, _DEADLINE_S = 0.05, 600.0


class Rows(NamedTuple):
  """Rows copied to the host.

  Attributes:
    name: of their file.
    values: [n, 1 + m, k·D] float32, centres and moments.
  """

  name: str
  values: np.ndarray


def is_shard(name: str) -> bool:
  """Returns whether a file name is that of rows or of the names of classes."""
  return bool(NAME.fullmatch(name) or _CLASSES.fullmatch(name))


def shard_names(step: int, tables: Sequence[ClassCentres]) -> list[str]:
  """Returns the names of all files of a step, on all workers.

  Args:
    step: number of steps done.
    tables: their variables exist.
  """
  names = [
    _name(step, number, first, last)
    for number, table in enumerate(tables)
    for first, last in table.ranges
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
    Rows(_name(step, number, first, first + len(values)), values)
    for number, table in enumerate(tables)
    for first, values in table.local_rows()
  ]
  if tables and is_chief:
    rows.append(Rows(f"ckpt-{step}.classes.npy", tables[0].name_hashes))
  return rows


def write_rows(folder: str, rows: Sequence[Rows]) -> None:
  """Writes each file, and then its size and hash beside it.

  Args:
    folder: of the checkpoints; it exists.
    rows: of this worker.

  Raises:
    OSError: a file cannot be written. The chief is told by a file, if there is room.
  """
  try:
    for each in rows:
      path = os.path.join(folder, each.name)
      with filesystem.replacing(path) as staged, open(staged, "wb") as file:
        np.lib.format.write_array(file, each.values, allow_pickle=False)
      filesystem.replace_file(_facts_path(path), json.dumps(facts(path)))
  except OSError as error:
    for each in rows:
      path = _facts_path(os.path.join(folder, each.name))
      filesystem.replace_file(path, json.dumps({"error": str(error)}))
    raise


def collect_facts(folder: str, names: Sequence[str]) -> dict[str, Any]:
  """Waits for the files of all workers, and returns their sizes and hashes by name.

  Args:
    folder: of the checkpoints.
    names: of all files.

  Raises:
    OSError: a worker could not write its file, or did not for ten minutes.
  """
  found: dict[str, Any] = {}
  deadline = time.monotonic() + _DEADLINE_S
  for name in names:
    path = _facts_path(os.path.join(folder, name))
    while not os.path.exists(path):
      if time.monotonic() > deadline:
        raise OSError(f"{name} was not written for {_DEADLINE_S:.0f} s")
      time.sleep(_WAIT_S)
    with open(path, encoding="utf-8") as file:
      found[name] = json.load(file)
    os.remove(path)
    if "error" in found[name]:
      raise OSError(found[name]["error"])
  return found


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
    match = re.match(r"ckpt-(\d{1,18})\.(centres-|classes)", name)
    is_left = match and int(match[1]) not in published
    if is_left or (match and name.endswith(".json")):
      os.remove(os.path.join(folder, name))


def restore_rows(
  folder: str, files: Mapping[str, Any], tables: Sequence[ClassCentres]
) -> None:
  """Assigns the saved rows of each replica of this worker.

  Args:
    folder: of the checkpoints.
    files: names and facts of the files of a valid checkpoint.
    tables: their variables exist.

  Raises:
    UserError: the checkpoint has other classes, or other tables.
  """
  parsed = [match for match in map(NAME.fullmatch, files) if match]
  num_saved = len({int(match[2]) for match in parsed})
  if num_saved != len(tables):
    raise UserError(
      f"the checkpoint has {num_saved} tables of class centres, and the loss of this "
      f"configuration has {len(tables)}; take another --model_dir."
    )
  if tables:
    _check_classes(folder, files, tables[0])
  for number, table in enumerate(tables):
    of_table = sorted(
      (int(match[3]), int(match[4]), match[0])
      for match in parsed
      if int(match[2]) == number
    )
    table.assign_rows(_Reader(folder, of_table).read)


class _Reader:
  """Reads rows of consecutive classes from the files of one table."""

  def __init__(self, folder: str, ranges: Sequence[tuple[int, int, str]]):
    self._folder = folder
    self._ranges = ranges

  def read(self, first: int, last: int) -> np.ndarray:
    """Returns [last − first, 1 + m, k·D] float32.

    Raises:
      UserError: no file has some of these classes.
    """
    parts, place = [], first
    for begin, end, name in self._ranges:
      if begin <= place < min(end, last):
        path = os.path.join(self._folder, name)
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        parts.append(values[place - begin : min(end, last) - begin])
        place = min(end, last)
    if place < last:
      raise UserError(
        f"{self._folder} has no rows of class {place}; remove the checkpoint."
      )
    return np.concatenate(parts) if len(parts) != 1 else np.asarray(parts[0])


def _check_classes(folder: str, files: Mapping[str, Any], table: ClassCentres) -> None:
  [name] = [name for name in files if _CLASSES.fullmatch(name)]
  saved = np.load(os.path.join(folder, name), allow_pickle=False)
  if not np.array_equal(saved, table.name_hashes):
    num_kept = len(np.intersect1d(saved, table.name_hashes))
    raise UserError(
      f"the checkpoint has centres of {len(saved)} classes, and the training data has "
      f"{table.num_classes}, of which {num_kept} are the same or in another order; "
      "take another --model_dir."
    )


def _name(step: int, table: int, first: int, last: int) -> str:
  return f"ckpt-{step}.centres-{table}-{first:010}-{last:010}.npy"


def _facts_path(path: str) -> str:
  return f"{path}.json"
