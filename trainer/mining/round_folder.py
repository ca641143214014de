"""A mining round on disk: plain arrays that are mapped, and a manifest.

    mining/round-00000400/anchors.npy            [A] int32 record numbers
                          positives.npy          [A, p] int32; −1 where there are fewer
                          negatives.npy          [A, n] int32; likewise
                          class_neighbours.npy   [L, m] int32 class ids; likewise
                          manifest.json          what it is, sizes and hashes

400 is the step of the encoder. A round is made in a folder aside and then renamed: one
that a process was killed over is never seen.

Shapes: A anchors, p positives, n negatives, L classes, m neighbours of a class.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np
from absl import logging

from trainer.data.folder_lock import alone_in
from trainer.errors import UnwritableError, UserError, reason_of
from trainer.mining.miner import Mined
from trainer.retrieval.embedding_folder import read_json
from trainer.retrieval.file_hash import sha256_of

FOLDER = "mining"
_BEFORE = "mining_before"
_ASIDE, _MANIFEST = "aside", "manifest.json"
_NAME = re.compile(r"round-(\d{8,18})")
_ROUND = "round-{:08d}"
_NUM_AXES = {"anchors": 1, "positives": 2, "negatives": 2, "class_neighbours": 2}
_OF_EXAMPLES = ("anchors", "positives", "negatives")


class OtherDataError(UserError):
  """A round is of other records or classes than those that are trained on."""


class MiningRound:
  """A round that is whole.

  Attributes:
    step: number of steps its encoder was trained.
    arrays: by name, mapped.
    facts: what the manifest says of it.

  Args:
    model_dir: folder of the run.
    step: one of `steps`.
    made_of: what tells the records and the classes from others, by name.

  Raises:
    UserError: it is not there, or not whole.
    OtherDataError: it is of other records or classes.
  """

  def __init__(self, model_dir: str, step: int, made_of: Mapping[str, Any]):
    self.step = step
    folder = path_of(model_dir, step)
    manifest = read_json(os.path.join(folder, _MANIFEST))
    if manifest is None:
      raise UserError(f"{folder} is no mining round, or was cut off; mine again.")
    try:
      files = manifest["files"]
      self.facts: Mapping[str, Any] = manifest["facts"]
      self.arrays = {
        name: _checked(folder, name, files[name]) for name in _NUM_AXES if name in files
      }
      bounds = int(manifest["num_records"]), int(manifest["num_classes"])
      found = {str(name): str(fact) for name, fact in manifest["made_of"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(
        f"{folder} has a damaged manifest ({type(error).__name__}: {error}); remove "
        "the round, and mine again."
      ) from error
    for name, wanted in made_of.items():
      if found.get(name) != str(wanted):
        raise OtherDataError(
          f"{folder} was mined of other data: {name} was {found.get(name)} and is "
          f"{wanted}; remove the round, and mine again."
        )
    self._check_values(folder, *bounds)

  def _check_values(self, folder: str, num_records: int, num_classes: int) -> None:
    arrays = self.arrays
    lengths = {len(arrays[name]) for name in _OF_EXAMPLES if name in arrays}
    is_whole = sum(name in arrays for name in _OF_EXAMPLES) in (0, 3)
    if not is_whole or len(lengths) > 1:
      raise UserError(f"{folder} has arrays that don't fit each other; mine again.")
    for name, array in arrays.items():
      most = num_classes if name == "class_neighbours" else num_records
      least = 0 if name == "anchors" else -1
      if array.size and not (array.min() >= least and array.max() < most):
        raise UserError(
          f"{os.path.join(folder, name)}.npy has numbers outside {least} to "
          f"{most - 1}; remove the round, and mine again."
        )


def path_of(model_dir: str, step: int) -> str:
  """The folder of the round of a step."""
  return os.path.join(model_dir, FOLDER, _ROUND.format(step))


def steps(model_dir: str) -> list[int]:
  """The steps of the rounds that are there, the newest first."""
  folder = os.path.join(model_dir, FOLDER)
  names = os.listdir(folder) if os.path.isdir(folder) else []
  matches = (_NAME.fullmatch(name) for name in names)
  return sorted((int(match[1]) for match in matches if match), reverse=True)


def time_of(model_dir: str, step: int) -> int:
  """When a round was made, in nanoseconds of the file system; 0 where it is gone."""
  try:
    return os.stat(os.path.join(path_of(model_dir, step), _MANIFEST)).st_mtime_ns
  except OSError:
    return 0


def write(
  model_dir: str,
  step: int,
  mined: Mined,
  *,
  made_of: Mapping[str, Any],
  num_records: int,
  num_classes: int,
) -> None:
  """Writes a round, whole or not at all; one of the same step is replaced.

  Args:
    model_dir: folder of the run; no other process writes rounds into it.
    step: number of steps the encoder was trained.
    mined: what it has.
    made_of: what tells the records and the classes from others, by name.
    num_records: of the data.
    num_classes: of the data.

  Raises:
    UnwritableError: it can't be written; what was there before is as it was.
  """
  aside = os.path.join(model_dir, FOLDER, _ASIDE)
  try:
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    files = {name: _save(aside, name, each) for name, each in mined.arrays.items()}
    manifest = {
      "step": step,
      "made_of": dict(made_of),
      "num_records": num_records,
      "num_classes": num_classes,
      "facts": mined.facts,
      "files": files,
    }
    with open(os.path.join(aside, _MANIFEST), "w", encoding="utf-8") as file:
      json.dump(manifest, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    remove(model_dir, step)
    os.replace(aside, path_of(model_dir, step))
  except OSError as error:
    shutil.rmtree(aside, ignore_errors=True)
    raise UnwritableError(
      f"the mining round of step {step} can't be written to "
      f"{os.path.join(model_dir, FOLDER)}: {reason_of(error)}."
    ) from error


@contextlib.contextmanager
def alone(model_dir: str) -> Iterator[None]:
  """Keeps other processes from writing rounds into the folder of a run.

  Args:
    model_dir: folder of the run.

  Yields:
    Nothing.

  Raises:
    UserError: another process writes rounds into it.
    UnwritableError: the folder can't be written to.
  """
  folder = os.path.join(model_dir, FOLDER)
  with contextlib.ExitStack() as claimed:
    try:
      os.makedirs(folder, exist_ok=True)
      claimed.enter_context(alone_in(folder, "mining into"))
    except OSError as error:
      raise UnwritableError(
        f"{folder} can't be written to: {reason_of(error)}."
      ) from error
    yield


def remove(model_dir: str, step: int) -> None:
  """Removes a round; who has it mapped keeps it."""
  folder = path_of(model_dir, step)
  if os.path.isdir(folder):
    # Its manifest first: what is left of it, if this is cut off, is no round.
    manifest = os.path.join(folder, _MANIFEST)
    if os.path.exists(manifest):
      os.remove(manifest)
    shutil.rmtree(folder)


def set_aside(model_dir: str) -> None:
  """Puts all rounds, and what was decided of them, into another folder beside.

  Args:
    model_dir: folder of the run. What was set aside in it before is removed.

  Raises:
    UserError: it can't be.
  """
  folder = os.path.join(model_dir, FOLDER)
  before = os.path.join(model_dir, _BEFORE)
  try:
    if os.path.isdir(before):
      shutil.rmtree(before)
    os.replace(folder, before)
  except OSError as error:
    raise UserError(
      f"{folder} is of another training, and can't be renamed to {before}: "
      f"{reason_of(error)}."
    ) from error
  logging.warning("%s is of another training: it is %s now.", folder, before)


def _save(folder: str, name: str, array: np.ndarray) -> dict[str, Any]:
  path = os.path.join(folder, f"{name}.npy")
  with open(path, "wb") as file:
    np.save(file, array.astype(np.int32, copy=False), allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())
  return {
    "bytes": os.path.getsize(path),
    "sha256": sha256_of(path),
    "shape": list(array.shape),
  }


def _checked(folder: str, name: str, expected: Mapping[str, Any]) -> np.ndarray:
  """An array, mapped, if its file is the one that the manifest tells of."""
  path = os.path.join(folder, f"{name}.npy")
  fault = _fault(path, expected)
  if fault is None:
    try:
      array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # Python's parser reads the head, and has many.
      fault = f"it is no array: {reason_of(error)}"
    else:
      shape = tuple(expected["shape"])
      is_as_told = array.dtype == np.int32 and array.shape == shape
      if is_as_told and array.ndim == _NUM_AXES[name]:
        return array
      fault = f"it has {array.dtype}{list(array.shape)}, the manifest {list(shape)}"
  raise UserError(f"{path} is damaged ({fault}); remove the round, and mine again.")


def _fault(path: str, expected: Mapping[str, Any]) -> Optional[str]:
  try:
    size = os.path.getsize(path)
    if size != expected["bytes"]:
      return f"it has {size} bytes and not {expected['bytes']}"
    is_same = sha256_of(path) == expected["sha256"]
  except OSError as error:
    return reason_of(error)
  return None if is_same else "its SHA-256 is another"
