"""Writes a folder of embeddings aside, and puts it in its place when it is whole.

Who has the embeddings open that were there before keeps them: files are replaced, and
never written over.

Shapes: N items, D dimensions, B rows of a batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trainer.data import paths
from trainer.data.class_names import ClassNames
from trainer.data.folder_lock import alone_in
from trainer.errors import UserError
from trainer.retrieval.embedding_folder import (
  LABELS_NAME,
  MANIFEST_NAME,
  ROWS_NAME,
  TEXT_ARRAYS,
  EmbeddingFolder,
  read_json,
)
from trainer.retrieval.file_hash import sha256_of

_ASIDE, _PROGRESS_NAME = "aside", "progress.json"
# Rows between two notes of how far the writing is.
_ROWS_PER_NOTE = 8_192


class EmbeddingWriter:
  """Writes embeddings in order, and goes on where a killed one stopped.

  Attributes:
    num_done: rows that are there already.
    is_finished: whether the folder holds just these embeddings, whole.

  Args:
    folder: is made if it is missing; what it holds stays until `finish`. No other
      process writes into it: see `alone`.
    shape: (N, D).
    dtype: "float32" or "float16".
    source: what is embedded by what; rows of another source are not gone on with.
    rows_per_batch: B; rows are gone on with in the same batches only.

  Raises:
    UserError: the folder can't be written to, or the disk is full.
  """

  def __init__(
    self,
    folder: str,
    *,
    shape: tuple[int, int],
    dtype: str,
    source: Mapping[str, Any],
    rows_per_batch: int,
  ):
    self._folder = folder
    self._aside = os.path.join(folder, _ASIDE)
    self._manifest: dict[str, Any] = {
      "num_items": shape[0],
      "num_dimensions": shape[1],
      "dtype": dtype,
      "distance": "euclidean",
      "source": json.loads(json.dumps(source)),
    }
    self._progress = {**self._manifest, "rows_per_batch": rows_per_batch}
    with _telling_of_failures(folder):
      if self._is_of(self._aside):  # Killed while it took its place.
        self._publish()
      self.is_finished = self._is_of(folder) and self._is_whole()
      self.num_done = shape[0] if self.is_finished else self._num_noted()
      if not self.is_finished:
        self._rows = self._open(shape, dtype)
    self._noted = self.num_done

  def append(self, rows: np.ndarray) -> None:
    """Writes the next rows [B, D]; those beyond the last are padding.

    Raises:
      UserError: the folder can't be written to.
    """
    start = self.num_done
    self.num_done = min(len(self._rows), start + len(rows))
    self._rows[start : self.num_done] = rows[: self.num_done - start]
    if self.num_done - self._noted >= _ROWS_PER_NOTE:
      with _telling_of_failures(self._folder):
        self._note()

  def finish(
    self, labels: np.ndarray, keys: Iterable[str], class_names: Iterable[str]
  ) -> None:
    """Writes what belongs to the rows, then the manifest, and replaces what was there.

    Args:
      labels: [N] int32.
      keys: the name of each row.
      class_names: the name of each class id.

    Raises:
      UserError: the folder can't be written to.
    """
    with _telling_of_failures(self._folder):
      self._note()
      np.save(os.path.join(self._aside, LABELS_NAME), np.asarray(labels, np.int32))
      _write_text(self._aside, "keys", keys)
      _write_text(self._aside, "class_names", class_names)
      sha256 = sha256_of(os.path.join(self._aside, ROWS_NAME))
      path = os.path.join(self._aside, MANIFEST_NAME)
      _write_json(path, {**self._manifest, "sha256": sha256})
      self._publish()
    self.is_finished = True

  def _is_of(self, folder: str) -> bool:
    """Whether a folder has the manifest of these embeddings."""
    known = read_json(os.path.join(folder, MANIFEST_NAME)) or {}
    return {**known, "sha256": None} == {**self._manifest, "sha256": None}

  def _is_whole(self) -> bool:
    try:
      kept = EmbeddingFolder(self._folder)
    except UserError:
      return False
    return kept.sha256 == sha256_of(os.path.join(self._folder, ROWS_NAME))

  def _num_noted(self) -> int:
    """How many rows aside can be gone on with."""
    known = read_json(os.path.join(self._aside, _PROGRESS_NAME)) or {}
    num_done = known.pop("num_done", 0)
    is_there = os.path.exists(os.path.join(self._aside, ROWS_NAME))
    return num_done if known == self._progress and is_there else 0

  def _open(self, shape: tuple[int, int], dtype: str) -> np.memmap:
    path = os.path.join(self._aside, ROWS_NAME)
    if self.num_done:
      return np.lib.format.open_memmap(path, "r+", dtype, shape)
    shutil.rmtree(self._aside, ignore_errors=True)
    os.makedirs(self._aside)
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
      # Else a full disk would end the process by a signal, in the middle of a row.
      with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return rows

  def _note(self) -> None:
    self._rows.flush()
    note = {**self._progress, "num_done": self.num_done}
    _write_json(os.path.join(self._aside, _PROGRESS_NAME), note)
    self._noted = self.num_done

  def _publish(self) -> None:
    """Moves all files to their place, the manifest last; can be done again."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self._folder, MANIFEST_NAME))
    names = set(os.listdir(self._aside)) - {MANIFEST_NAME, _PROGRESS_NAME}
    for name in (*sorted(names), MANIFEST_NAME):
      os.replace(os.path.join(self._aside, name), os.path.join(self._folder, name))
    shutil.rmtree(self._aside)


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
  """Makes a folder of embeddings, and keeps other processes from writing into it.

  Args:
    folder: is made if it is missing.

  Yields:
    Nothing.

  Raises:
    UserError: another process writes into it, or it can't be written to.
  """
  with contextlib.ExitStack() as claimed:
    with _telling_of_failures(folder):
      os.makedirs(folder, exist_ok=True)
      claimed.enter_context(alone_in(folder, "embedding into"))
    yield


@contextlib.contextmanager
def _telling_of_failures(folder: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f"{folder} can't be written to: {error.strerror}.") from error


def _write_text(folder: str, name: str, texts: Iterable[str]) -> None:
  names = ClassNames.of(texts)
  for part in TEXT_ARRAYS:
    np.save(os.path.join(folder, f"{name}_{part}.npy"), getattr(names, part))


def _write_json(path: str, content: Mapping[str, Any]) -> None:
  paths.replace_file(path, json.dumps(content, indent=2))
