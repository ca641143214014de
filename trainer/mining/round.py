"""A mining round on disk, its specification, and the log of rounds in use.

    mining/round-00000400/anchors.npy            [A] int32 record numbers
                          positives.npy          [A, p] int32; −1 where there are fewer
                          negatives.npy          [A, n] int32; likewise
                          class_neighbours.npy   [L, m] int32 class ids; likewise
                          manifest.json          metadata, sizes and hashes

400 is the step of the encoder. A round is written to a temporary folder and renamed
when it is complete, so a process killed while writing leaves no partial round.

`mining/rounds.jsonl` has one object per decision. {"step": 400, "round": 200} means
that batches from step 400 on are drawn from the round of step 200; null means the plain
sampler.

Shapes: N records that can be mined, A anchors, p positives, n negatives, L classes of
the data, m neighbours of a class.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np
from absl import logging

from trainer.data.dataset import Dataset
from trainer.errors import UnwritableError, UserError, short_reason
from trainer.mining.miner import Miner, RoundContent
from trainer.retrieval.embedding_store import read_json
from trainer.runtime import filesystem
from trainer.runtime.filesystem import sha256_of
from trainer.runtime.lease import locked_folder

ROUNDS_FOLDER = "mining"
_ARCHIVE = "mining_before"
_STAGING, _MANIFEST = "staging", "manifest.json"
_NAME = re.compile(r"round-(\d{8,18})(?:\.old)?")
_ROUND = "round-{:08d}"
_NUM_AXES = {"anchors": 1, "positives": 2, "negatives": 2, "class_neighbours": 2}
_EXAMPLE_ARRAYS = ("anchors", "positives", "negatives")

ROUND_LOG_FILE = os.path.join(ROUNDS_FOLDER, "rounds.jsonl")


class Round(Protocol):
  """Protocol of a round, from which a sampler is built."""

  @property
  def step(self) -> int:
    """Number of steps the encoder of the round was trained."""

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """Arrays by name, as in `RoundContent`."""


class RoundSpec(NamedTuple):
  """Specification of a round: a `Round` of step 0 without values to draw."""

  step: int
  arrays: Mapping[str, np.ndarray]


def round_spec(miner: Optional[Miner], dataset: Dataset) -> RoundSpec:
  """Returns the specification of a miner's largest round, for checks before mining.

  Args:
    miner: None if another process mines; its rounds may then have any content.
    dataset: its training classes are mined. Each record counts as an anchor, which no
      round exceeds.

  Returns:
    Arrays that take no memory.
  """
  num_classes = dataset.index.num_classes
  shapes: dict[str, tuple[int, ...]] = {}
  if miner is None or miner.examples is not None:
    num_anchors = _num_items(
      dataset, None if miner is None else miner.records_per_class
    )
    lists = (num_anchors, 1)
    shapes.update(anchors=(num_anchors,), positives=lists, negatives=lists)
  if miner is None or miner.num_class_neighbours:
    num_neighbours = num_classes if miner is None else miner.num_class_neighbours
    shapes["class_neighbours"] = (num_classes, num_neighbours)
  nothing = np.int32(-1)
  return RoundSpec(
    0, {name: np.broadcast_to(nothing, shape) for name, shape in shapes.items()}
  )


def _num_items(dataset: Dataset, records_per_class: Optional[int]) -> int:
  """Returns N."""
  sizes = np.diff(dataset.index.member_table.starts)[dataset.train_classes]
  return int(
    sizes.sum()
    if records_per_class is None
    else sizes.clip(max=records_per_class).sum()
  )


class OtherDataError(UserError):
  """A round was mined from other records or classes than those of the training."""


class MiningRound:
  """A complete round.

  Attributes:
    step: number of steps the encoder of the round was trained.
    arrays: memory-mapped arrays by name.
    metadata: metadata in the manifest.

  Args:
    model_dir: folder of the run.
    step: one of `round_steps`.
    fingerprint: of the records and classes, by name.

  Raises:
    UserError: the round is missing or incomplete.
    OtherDataError: the round is of other records or classes.
  """

  def __init__(self, model_dir: str, step: int, fingerprint: Mapping[str, Any]):
    self.step = step
    folder = filesystem.current_folder(round_path(model_dir, step))
    manifest = read_json(os.path.join(folder, _MANIFEST))
    if manifest is None:
      raise UserError(f"{folder} is not a complete mining round; mine again.")
    try:
      files = manifest["files"]
      self.metadata: Mapping[str, Any] = manifest["metadata"]
      self.arrays = {
        name: _open_array(folder, name, files[name])
        for name in _NUM_AXES
        if name in files
      }
      bounds = int(manifest["num_records"]), int(manifest["num_classes"])
      found = {str(name): str(fact) for name, fact in manifest["fingerprint"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(
        f"{folder} has a damaged manifest ({type(error).__name__}: {error}); remove "
        "the round, then mine again."
      ) from error
    for name, wanted in fingerprint.items():
      if found.get(name) != str(wanted):
        raise OtherDataError(
          f"{folder} was mined from other data: {name} was {found.get(name)} and is "
          f"{wanted}; remove the round, then mine again."
        )
    self._check_values(folder, *bounds)

  def _check_values(self, folder: str, num_records: int, num_classes: int) -> None:
    arrays = self.arrays
    lengths = {len(arrays[name]) for name in _EXAMPLE_ARRAYS if name in arrays}
    is_complete = sum(name in arrays for name in _EXAMPLE_ARRAYS) in (0, 3)
    if not is_complete or len(lengths) > 1:
      raise UserError(f"{folder} has arrays of inconsistent sizes; mine again.")
    for name, array in arrays.items():
      most = num_classes if name == "class_neighbours" else num_records
      least = 0 if name == "anchors" else -1
      if array.size and not (array.min() >= least and array.max() < most):
        raise UserError(
          f"{os.path.join(folder, name)}.npy has values outside {least} to {most - 1}; "
          "remove the round, then mine again."
        )


def round_path(model_dir: str, step: int) -> str:
  """Returns the folder of the round of a step."""
  return os.path.join(model_dir, ROUNDS_FOLDER, _ROUND.format(step))


def round_steps(model_dir: str) -> list[int]:
  """Returns the steps of the rounds on disk, newest first."""
  folder = os.path.join(model_dir, ROUNDS_FOLDER)
  names = os.listdir(folder) if os.path.isdir(folder) else []
  matches = (_NAME.fullmatch(name) for name in names)
  return sorted({int(match[1]) for match in matches if match}, reverse=True)


def round_time(model_dir: str, step: int) -> int:
  """Returns when a round was made, in file-system nanoseconds; 0 if it is missing."""
  folder = filesystem.current_folder(round_path(model_dir, step))
  try:
    return os.stat(os.path.join(folder, _MANIFEST)).st_mtime_ns
  except OSError:
    return 0


def write_round(
  model_dir: str,
  step: int,
  mined: RoundContent,
  *,
  fingerprint: Mapping[str, Any],
  num_records: int,
  num_classes: int,
) -> None:
  """Writes a round atomically; a round of the same step is replaced.

  A process killed at any time leaves the complete old round or the complete new one.

  Args:
    model_dir: folder of the run; no other process writes rounds to it.
    step: number of steps the encoder was trained.
    mined: content of the round.
    fingerprint: of the records and classes, by name.
    num_records: of the data.
    num_classes: of the data.

  Raises:
    UnwritableError: the round cannot be written; the folder is unchanged.
  """
  staging_dir = os.path.join(model_dir, ROUNDS_FOLDER, _STAGING)
  try:
    shutil.rmtree(staging_dir, ignore_errors=True)
    os.makedirs(staging_dir)
    files = {
      name: _save_array(staging_dir, name, each) for name, each in mined.arrays.items()
    }
    manifest = {
      "step": step,
      "fingerprint": dict(fingerprint),
      "num_records": num_records,
      "num_classes": num_classes,
      "metadata": mined.metadata,
      "files": files,
    }
    content = json.dumps(manifest, indent=1).encode()
    filesystem.write_bytes(os.path.join(staging_dir, _MANIFEST), content)
    filesystem.replace_folder(staging_dir, round_path(model_dir, step))
  except OSError as error:
    shutil.rmtree(staging_dir, ignore_errors=True)
    raise UnwritableError(
      f"the mining round of step {step} can't be written to "
      f"{os.path.join(model_dir, ROUNDS_FOLDER)}: {short_reason(error)}."
    ) from error


@contextlib.contextmanager
def locked_rounds(model_dir: str) -> Iterator[None]:
  """Keeps other processes from writing rounds to the folder of a run.

  Args:
    model_dir: folder of the run.

  Raises:
    UserError: another process writes rounds to the folder.
    UnwritableError: the folder cannot be written to.
  """
  folder = os.path.join(model_dir, ROUNDS_FOLDER)
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(locked_folder(folder, "mining into"))
    except OSError as error:
      raise UnwritableError(
        f"{folder} can't be written: {short_reason(error)}."
      ) from error
    yield


def remove_round(model_dir: str, step: int) -> None:
  """Removes a round; processes that have it mapped keep its content."""
  folder = round_path(model_dir, step)
  filesystem.recover_folder(folder)
  if os.path.isdir(folder):
    # Remove the manifest first, so that an interrupted removal leaves no valid round.
    manifest = os.path.join(folder, _MANIFEST)
    if os.path.exists(manifest):
      os.remove(manifest)
    shutil.rmtree(folder)


def archive_rounds(model_dir: str) -> None:
  """Moves all rounds and their decisions to a folder for earlier rounds.

  Args:
    model_dir: folder of the run. Rounds that were archived before are removed.

  Raises:
    UserError: the folder cannot be renamed.
  """
  folder = os.path.join(model_dir, ROUNDS_FOLDER)
  archive = os.path.join(model_dir, _ARCHIVE)
  try:
    if os.path.isdir(archive):
      shutil.rmtree(archive)
    os.replace(folder, archive)
  except OSError as error:
    raise UserError(
      f"{folder} belongs to another training and can't be renamed to {archive}: "
      f"{short_reason(error)}."
    ) from error
  logging.warning("%s belongs to another training; renamed to %s.", folder, archive)


def _save_array(folder: str, name: str, array: np.ndarray) -> dict[str, Any]:
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


def _open_array(folder: str, name: str, expected: Mapping[str, Any]) -> np.ndarray:
  """Returns a memory-mapped array, if its file matches the manifest."""
  path = os.path.join(folder, f"{name}.npy")
  problem = _find_problem(path, expected)
  if problem is None:
    try:
      array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # Python's parser of the header raises many types.
      problem = f"it is not an array: {short_reason(error)}"
    else:
      shape = tuple(expected["shape"])
      has_declared_shape = array.dtype == np.int32 and array.shape == shape
      if has_declared_shape and array.ndim == _NUM_AXES[name]:
        return array
      problem = (
        f"it has {array.dtype}{list(array.shape)}, but {list(shape)} in the manifest"
      )
  raise UserError(f"{path} is damaged ({problem}); remove the round, then mine again.")


def _find_problem(path: str, expected: Mapping[str, Any]) -> Optional[str]:
  try:
    size = os.path.getsize(path)
    if size != expected["bytes"]:
      return f"it has {size} bytes instead of {expected['bytes']}"
    is_same = sha256_of(path) == expected["sha256"]
  except OSError as error:
    return short_reason(error)
  return None if is_same else "its SHA-256 differs"


class RoundLog:
  """Log of the decisions of a run.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    self.path = os.path.join(model_dir, ROUND_LOG_FILE)

  def decisions(self) -> dict[int, Optional[int]]:
    """Returns the round in use from each step on, ascending; None for plain batches.

    Raises:
      UserError: the file cannot be read.
    """
    if not os.path.exists(self.path):
      return {}
    try:
      with open(self.path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
      found = {int(row["step"]): _round_of(row["round"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{self.path} is damaged ({type(error).__name__}: {error}); restore it, or "
        f"remove {os.path.dirname(self.path)} to continue with new rounds."
      ) from error
    return dict(sorted(found.items()))

  def add(self, step: int, round_step: Optional[int]) -> None:
    """Writes a decision to disk.

    Args:
      step: first step with the round.
      round_step: step of the round; None for the plain sampler.

    Raises:
      UnwritableError: the decision cannot be written.
    """
    decisions = sorted({**self.decisions(), step: round_step}.items())
    rows = (json.dumps({"step": s, "round": r}) + "\n" for s, r in decisions)
    try:
      os.makedirs(os.path.dirname(self.path), exist_ok=True)
      filesystem.replace_file(self.path, "".join(rows))
    except OSError as error:
      raise UnwritableError(
        f"{self.path} can't be written: {short_reason(error)}."
      ) from error


def _round_of(value: object) -> Optional[int]:
  if value is None or type(value) is int:
    return value
  raise ValueError(f"{value!r:.40} is not the step of a round")
