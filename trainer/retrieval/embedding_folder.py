"""Embeddings on disk: plain arrays that are opened by mapping, and a manifest.

    embeddings.npy        [N, D] float32 or float16
    labels.npy            [N] int32 class ids
    keys_*.npy            the name of each item; see `trainer.data.class_names`
    class_names_*.npy     the name of each class
    manifest.json         what it is, written last

Shapes: N items, D dimensions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from trainer.data.class_names import ClassNames
from trainer.errors import UserError

MANIFEST_NAME, ROWS_NAME, LABELS_NAME = "manifest.json", "embeddings.npy", "labels.npy"
TEXT_ARRAYS = ("text", "starts", "hashes")


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
        f"{folder} should hold {shape[0]} embeddings of {shape[1]} dimensions, and has "
        f"arrays of {self.embeddings.shape}, {len(self.labels)} labels and "
        f"{len(self.keys)} keys; embed again."
      )
    _check_labels(folder, self.labels, len(self.class_names))

  def position(self, key: str) -> Optional[int]:
    """The row of a key; None where there is none."""
    [wanted] = ClassNames.of([key]).hashes
    rows = np.flatnonzero(self.keys.hashes == wanted)
    return next((int(row) for row in rows if self.keys[int(row)] == key), None)


def _mapped(folder: str, name: str) -> np.ndarray:
  """An array, mapped; nothing in it is ever unpickled."""
  path = os.path.join(folder, name)
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception as error:  # Python's parser reads the head, and has many.
    raise UserError(f"{path} is missing or damaged; embed again.") from error


def _read_text(folder: str, name: str) -> ClassNames:
  arrays = [_mapped(folder, f"{name}_{part}.npy") for part in TEXT_ARRAYS]
  text, starts, hashes = arrays
  is_whole = starts.ndim == 1 and len(starts) > 0 and hashes.shape == (len(starts) - 1,)
  is_whole = is_whole and starts[0] == 0 and starts[-1] == len(text)
  if not (is_whole and (starts[1:] >= starts[:-1]).all()):
    path = os.path.join(folder, f"{name}_starts.npy")
    raise UserError(f"{path} has no parts from 0 to {len(text)}; embed again.")
  return ClassNames(text, starts, hashes)


def _check_labels(folder: str, labels: np.ndarray, num_classes: int) -> None:
  if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
    raise UserError(
      f"{os.path.join(folder, LABELS_NAME)} has labels outside 0 to {num_classes - 1}; "
      "embed again."
    )


def read_json(path: str) -> Optional[dict[str, Any]]:
  """What a file says; None where there is none, or it is damaged."""
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None
