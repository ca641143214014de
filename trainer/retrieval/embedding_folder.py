"""Embeddings on disk: plain arrays that are opened by mapping, and a manifest.

    embeddings.npy        [N, D] float32 or float16
    labels.npy            [N] int32 class ids
    keys_*.npy            the name of each item; see `trainer.data.class_names`
    class_names_*.npy     the name of each class
    manifest.json         what it is, written last

Shapes: N items, D dimensions, B rows of a batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import numpy as np

from trainer.data.class_names import ClassNames
from trainer.errors import UserError
from trainer.retrieval.file_hash import sha256_of

MANIFEST_NAME = "manifest.json"
_ROWS_NAME, _PROGRESS_NAME = "embeddings.npy", "progress.json"
_TEXT_ARRAYS = ("text", "starts", "hashes")
# Rows between two notes of how far the writing is.
_ROWS_PER_NOTE = 8_192


class EmbeddingFolder:
  """Embeddings with labels and keys, mapped.

  Attributes:
    embeddings: [N, D] float32 or float16.
    labels: [N] int32 class ids.
    keys: the name of each item.
    class_names: the name of each class id.
    source: what was embedded by what; plain values.
    sha256: of the file of embeddings, as it was written.

  Args:
    folder: as `EmbeddingWriter` left it.

  Raises:
    UserError: it holds no embeddings, or arrays that don't fit its manifest.
  """

  def __init__(self, folder: str):
    manifest = _read_json(os.path.join(folder, MANIFEST_NAME))
    if manifest is None:
      raise UserError(f"{folder} has no embeddings; run --mode=embed first.")
    self.embeddings = _mapped(folder, _ROWS_NAME)
    self.labels = _mapped(folder, "labels.npy")
    self.keys = _read_text(folder, "keys")
    self.class_names = _read_text(folder, "class_names")
    self.source: Mapping[str, Any] = manifest.get("source", {})
    self.sha256: Optional[str] = manifest.get("sha256")
    shape = (manifest.get("num_items"), manifest.get("num_dimensions"))
    found = {len(self.labels), len(self.keys), len(self.embeddings)}
    if self.embeddings.shape != shape or found != {shape[0]}:
      raise UserError(
        f"{folder} should hold {shape[0]} embeddings of {shape[1]} dimensions, and has "
        f"arrays of {self.embeddings.shape}, {len(self.labels)} labels and "
        f"{len(self.keys)} keys; embed again."
      )

  def position(self, key: str) -> Optional[int]:
    """The row of a key; None where there is none."""
    [wanted] = ClassNames.of([key]).hashes
    rows = np.flatnonzero(self.keys.hashes == wanted)
    return next((int(row) for row in rows if self.keys[int(row)] == key), None)


class EmbeddingWriter:
  """Writes embeddings in order, and goes on where a killed one stopped.

  Attributes:
    num_done: rows that are there already.

  Args:
    folder: is made if it is missing.
    shape: (N, D).
    dtype: "float32" or "float16".
    source: what is embedded by what; rows of another source are not gone on with.
  """

  def __init__(
    self,
    folder: str,
    *,
    shape: tuple[int, int],
    dtype: str,
    source: Mapping[str, Any],
  ):
    os.makedirs(folder, exist_ok=True)
    self._folder = folder
    self._source = dict(source)
    self._progress = {"shape": list(shape), "dtype": dtype, "source": self._source}
    known = _read_json(os.path.join(folder, _PROGRESS_NAME)) or {}
    self.num_done = known.pop("num_done", 0) if self._is_same(known) else 0
    path = os.path.join(folder, _ROWS_NAME)
    if os.path.exists(os.path.join(folder, MANIFEST_NAME)):
      os.remove(os.path.join(folder, MANIFEST_NAME))
    mode = "r+" if self.num_done else "w+"
    self._rows = np.lib.format.open_memmap(path, mode, dtype, shape)
    self._num_noted = self.num_done

  def append(self, rows: np.ndarray) -> None:
    """Writes the next rows [B, D]; those beyond the last are padding."""
    start = self.num_done
    self.num_done = min(len(self._rows), start + len(rows))
    self._rows[start : self.num_done] = rows[: self.num_done - start]
    if self.num_done - self._num_noted >= _ROWS_PER_NOTE:
      self._note()

  def finish(
    self, labels: np.ndarray, keys: Iterable[str], class_names: Iterable[str]
  ) -> None:
    """Writes what belongs to the rows, and then the manifest.

    Args:
      labels: [N] int32.
      keys: the name of each row.
      class_names: the name of each class id.
    """
    self._note()
    np.save(os.path.join(self._folder, "labels.npy"), np.asarray(labels, np.int32))
    _write_text(self._folder, "keys", keys)
    _write_text(self._folder, "class_names", class_names)
    num_items, num_dimensions = self._rows.shape
    manifest = {
      "num_items": num_items,
      "num_dimensions": num_dimensions,
      "dtype": str(self._rows.dtype),
      "distance": "euclidean",
      "sha256": sha256_of(os.path.join(self._folder, _ROWS_NAME)),
      "source": self._source,
    }
    _write_json(os.path.join(self._folder, MANIFEST_NAME), manifest)
    os.remove(os.path.join(self._folder, _PROGRESS_NAME))

  def _is_same(self, known: Mapping[str, Any]) -> bool:
    rest = {name: value for name, value in known.items() if name != "num_done"}
    path = os.path.join(self._folder, _ROWS_NAME)
    return rest == self._progress and os.path.exists(path)

  def _note(self) -> None:
    self._rows.flush()
    note = {**self._progress, "num_done": self.num_done}
    _write_json(os.path.join(self._folder, _PROGRESS_NAME), note)
    self._num_noted = self.num_done


def _mapped(folder: str, name: str) -> np.ndarray:
  """An array, mapped; nothing in it is ever unpickled."""
  path = os.path.join(folder, name)
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is missing or damaged; embed again.") from error


def _read_text(folder: str, name: str) -> ClassNames:
  arrays = [_mapped(folder, f"{name}_{part}.npy") for part in _TEXT_ARRAYS]
  return ClassNames(*arrays)


def _write_text(folder: str, name: str, texts: Iterable[str]) -> None:
  names = ClassNames.of(texts)
  for part in _TEXT_ARRAYS:
    np.save(os.path.join(folder, f"{name}_{part}.npy"), getattr(names, part))


def _read_json(path: str) -> Optional[dict[str, Any]]:
  """What a file says; None where there is none, or it is damaged."""
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


def _write_json(path: str, content: Mapping[str, Any]) -> None:
  with open(path + ".new", "w", encoding="utf-8") as file:
    json.dump(content, file, indent=2)
  os.replace(path + ".new", path)
