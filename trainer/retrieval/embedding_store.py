"""Embeddings on disk: memory-mapped arrays, a manifest and their provenance.

    embeddings.npy        [N, D] float32 or float16
    labels.npy            [N] int32 class ids
    keys_*.npy            the name of each item; see `trainer.data.index_arrays`
    class_names_*.npy     the name of each class
    manifest.json         sizes and provenance, written last

Files are replaced and never overwritten, so a process that has earlier embeddings open
keeps them.

Shapes: N items, D dimensions, B rows of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from trainer.data.index_arrays import ClassNames
from trainer.data.records import RecordIndex
from trainer.errors import UserError
from trainer.runtime import filesystem
from trainer.runtime.filesystem import sha256_of
from trainer.runtime.lease import locked_folder

# Bindings that determine the embeddings, in addition to the weights.
_MODEL = ("evaluate.encoder", "evaluate.dataset.decoder")

MANIFEST_NAME, ROWS_NAME, LABELS_NAME = "manifest.json", "embeddings.npy", "labels.npy"
TEXT_ARRAYS = ("text", "starts", "hashes")

_STAGING, _PROGRESS_NAME = "staging", "progress.json"
# Rows between two writes of the progress file.
_ROWS_PER_NOTE = 8_192


def encoder_provenance(
  encoder: tf.keras.Model, values: Mapping[str, str], step: int
) -> dict[str, Any]:
  """Returns the fingerprint of a trained encoder, by name.

  Args:
    encoder: restored.
    values: of the config, by path.
    step: number of steps it was trained.
  """
  model, weights = hashlib.sha256(), hashlib.sha256()
  for path, value in sorted(values.items()):
    if path.startswith(_MODEL):
      model.update(f"{path} = {value}\n".encode())
  strategy = tf.distribute.get_strategy()
  for variable in encoder.variables:
    # Use one replica: the mean of several may differ by a rounding error.
    value = strategy.experimental_local_results(variable)[0].numpy()
    weights.update(np.ascontiguousarray(value).tobytes())
  return {
    "step": step,
    "encoder and decoder": model.hexdigest()[:16],
    "weights": weights.hexdigest()[:16],
  }


def check_same_encoder(source: Mapping[str, Any], encoder: Mapping[str, Any]) -> None:
  """Checks that embeddings were made by an encoder.

  Args:
    source: provenance of the embeddings.
    encoder: fingerprint of the encoder, from `encoder_provenance`.

  Raises:
    UserError: the embeddings are of another encoder; names the difference.
  """
  _check_same(
    source, encoder, "The embeddings were computed by another encoder than the run's"
  )


def check_same_records(source: Mapping[str, Any], index: RecordIndex) -> None:
  """Checks that embeddings are of the current records.

  Args:
    source: provenance of the embeddings.
    index: of the records.

  Raises:
    UserError: the embeddings are of other records; names the difference.
  """
  _check_same(
    source, index.fingerprint(), "The embeddings were computed from other records"
  )


def _check_same(source: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
  for name, value in now.items():
    if source.get(name) != value:
      raise UserError(
        f"{what}: {name} was {source.get(name)} and is {value}; run --mode=embed again."
      )


class EmbeddingFolder:
  """Embeddings with labels and keys, memory-mapped.

  Attributes:
    embeddings: [N, D] float32 or float16.
    labels: [N] int32 class ids.
    keys: the name of each item.
    class_names: the name of each class id.
    source: provenance of the embeddings; plain values.
    sha256: hash of the embeddings file when it was written.

  Args:
    folder: written by `EmbeddingWriter`.

  Raises:
    UserError: it has no embeddings, or its arrays do not match its manifest.
  """

  def __init__(self, folder: str):
    manifest = read_json(os.path.join(folder, MANIFEST_NAME))
    if manifest is None:
      raise UserError(f"{folder} has no embeddings; run --mode=embed first.")
    self.embeddings = _mapped(folder, ROWS_NAME)
    self.labels = _mapped(folder, LABELS_NAME)
    self.keys = _read_text(folder, "keys")
    self.class_names = _read_text(folder, "class_names")
    self.source: Mapping[str, Any] = manifest.get("source", {})
    self.sha256: Optional[str] = manifest.get("sha256")
    shape = (manifest.get("num_items"), manifest.get("num_dimensions"))
    found = {len(self.labels), len(self.keys), len(self.embeddings)}
    if self.embeddings.shape != shape or found != {shape[0]}:
      raise UserError(
        f"{folder} should have {shape[0]} embeddings of {shape[1]} dimensions, but has "
        f"arrays of {self.embeddings.shape}, {len(self.labels)} labels and "
        f"{len(self.keys)} keys; run --mode=embed again."
      )
    _check_labels(folder, self.labels, len(self.class_names))

  def position(self, key: str) -> Optional[int]:
    """Returns the row of a key; None if there is none."""
    [wanted] = ClassNames.from_names([key]).hashes
    rows = np.flatnonzero(self.keys.hashes == wanted)
    return next((int(row) for row in rows if self.keys[int(row)] == key), None)


def _mapped(folder: str, name: str) -> np.ndarray:
  """Returns a memory-mapped array; nothing is unpickled."""
  path = os.path.join(folder, name)
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception as error:  # Python's parser of the header raises many types.
    raise UserError(f"{path} is missing or damaged; run --mode=embed again.") from error


def _read_text(folder: str, name: str) -> ClassNames:
  arrays = [_mapped(folder, f"{name}_{part}.npy") for part in TEXT_ARRAYS]
  text, starts, hashes = arrays
  is_valid = starts.ndim == 1 and len(starts) > 0 and hashes.shape == (len(starts) - 1,)
  is_valid = is_valid and starts[0] == 0 and starts[-1] == len(text)
  if not (is_valid and (starts[1:] >= starts[:-1]).all()):
    path = os.path.join(folder, f"{name}_starts.npy")
    raise UserError(
      f"{path} has no ascending parts from 0 to {len(text)}; run --mode=embed again."
    )
  return ClassNames(text, starts, hashes)


def _check_labels(folder: str, labels: np.ndarray, num_classes: int) -> None:
  if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
    raise UserError(
      f"{os.path.join(folder, LABELS_NAME)} has labels outside 0 to {num_classes - 1}; "
      "run --mode=embed again."
    )


def read_json(path: str) -> Optional[dict[str, Any]]:
  """Reads a JSON object; returns None if the file is missing or damaged."""
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


class EmbeddingWriter:
  """Writes embeddings in order, and resumes where a killed writer stopped.

  Attributes:
    num_done: number of rows already written.
    is_finished: whether the folder holds exactly these embeddings, complete.

  Args:
    folder: is created if it is missing; its content stays until `finish`. No other
      process may write to it: see `locked_embeddings`.
    shape: (N, D).
    dtype: "float32" or "float16".
    source: provenance of the embeddings; rows of another source are discarded.
    rows_per_batch: B; rows are resumed only with the same batches.

  Raises:
    UserError: the folder cannot be written to, or the disk is full.
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
    self._staging_dir = os.path.join(folder, _STAGING)
    self._manifest: dict[str, Any] = {
      "num_items": shape[0],
      "num_dimensions": shape[1],
      "dtype": dtype,
      "distance": "euclidean",
      "source": json.loads(json.dumps(source)),
    }
    self._progress = {**self._manifest, "rows_per_batch": rows_per_batch}
    with _reporting_failures(folder):
      if self._belongs_to(self._staging_dir):  # Killed during `_publish`.
        self._publish()
      self.is_finished = self._belongs_to(folder) and self._is_complete()
      self.num_done = shape[0] if self.is_finished else self._num_noted()
      if not self.is_finished:
        self._rows = self._open(shape, dtype)
    self._noted = self.num_done

  def append(self, rows: np.ndarray) -> None:
    """Writes the next rows [B, D]; rows beyond the last are padding.

    Raises:
      UserError: the folder cannot be written to.
    """
    start = self.num_done
    self.num_done = min(len(self._rows), start + len(rows))
    self._rows[start : self.num_done] = rows[: self.num_done - start]
    if self.num_done - self._noted >= _ROWS_PER_NOTE:
      with _reporting_failures(self._folder):
        self._note()

  def finish(
    self, labels: np.ndarray, keys: Iterable[str], class_names: Iterable[str]
  ) -> None:
    """Writes labels, names and the manifest, and replaces the earlier embeddings.

    Args:
      labels: [N] int32.
      keys: the name of each row.
      class_names: the name of each class id.

    Raises:
      UserError: the folder cannot be written to.
    """
    with _reporting_failures(self._folder):
      self._note()
      np.save(
        os.path.join(self._staging_dir, LABELS_NAME), np.asarray(labels, np.int32)
      )
      _write_text(self._staging_dir, "keys", keys)
      _write_text(self._staging_dir, "class_names", class_names)
      sha256 = sha256_of(os.path.join(self._staging_dir, ROWS_NAME))
      path = os.path.join(self._staging_dir, MANIFEST_NAME)
      _write_json(path, {**self._manifest, "sha256": sha256})
      self._publish()
    self.is_finished = True

  def _belongs_to(self, folder: str) -> bool:
    """Returns whether a folder has the manifest of these embeddings."""
    known = read_json(os.path.join(folder, MANIFEST_NAME)) or {}
    return {**known, "sha256": None} == {**self._manifest, "sha256": None}

  def _is_complete(self) -> bool:
    try:
      stored = EmbeddingFolder(self._folder)
    except UserError:
      return False
    return stored.sha256 == sha256_of(os.path.join(self._folder, ROWS_NAME))

  def _num_noted(self) -> int:
    """Returns the number of rows in the temporary folder that can be kept."""
    known = read_json(os.path.join(self._staging_dir, _PROGRESS_NAME)) or {}
    num_done = known.pop("num_done", 0)
    has_rows = os.path.exists(os.path.join(self._staging_dir, ROWS_NAME))
    return num_done if known == self._progress and has_rows else 0

  def _open(self, shape: tuple[int, int], dtype: str) -> np.memmap:
    path = os.path.join(self._staging_dir, ROWS_NAME)
    if self.num_done:
      return np.lib.format.open_memmap(path, "r+", dtype, shape)
    shutil.rmtree(self._staging_dir, ignore_errors=True)
    os.makedirs(self._staging_dir)
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
      # Otherwise a full disk would kill the process by a signal while it writes.
      with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return rows

  def _note(self) -> None:
    self._rows.flush()
    note = {**self._progress, "num_done": self.num_done}
    _write_json(os.path.join(self._staging_dir, _PROGRESS_NAME), note)
    self._noted = self.num_done

  def _publish(self) -> None:
    """Moves all files to their final place, the manifest last; can be repeated."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self._folder, MANIFEST_NAME))
    names = set(os.listdir(self._staging_dir)) - {MANIFEST_NAME, _PROGRESS_NAME}
    for name in (*sorted(names), MANIFEST_NAME):
      os.replace(
        os.path.join(self._staging_dir, name), os.path.join(self._folder, name)
      )
    shutil.rmtree(self._staging_dir)


@contextlib.contextmanager
def locked_embeddings(folder: str) -> Iterator[None]:
  """Creates a folder of embeddings, and keeps other processes from writing to it.

  Args:
    folder: is created if it is missing.

  Raises:
    UserError: another process writes to the folder, or it cannot be written to.
  """
  with contextlib.ExitStack() as stack:
    with _reporting_failures(folder):
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(locked_folder(folder, "embedding into"))
    yield


@contextlib.contextmanager
def _reporting_failures(folder: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f"{folder} can't be written: {error.strerror}.") from error


def _write_text(folder: str, name: str, texts: Iterable[str]) -> None:
  names = ClassNames.from_names(texts)
  for part in TEXT_ARRAYS:
    np.save(os.path.join(folder, f"{name}_{part}.npy"), getattr(names, part))


def _write_json(path: str, content: Mapping[str, Any]) -> None:
  filesystem.replace_file(path, json.dumps(content, indent=2))
