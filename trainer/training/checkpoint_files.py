"""The files of checkpoints: listing, integrity checks and publication.

A checkpoint `ckpt-N` consists of two files as TensorFlow writes them, and `ckpt-N.json`
with their sizes and SHA-256. The latter is renamed into place last: a checkpoint
without it belongs to a process that was killed. Plain Python; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from trainer.errors import UserError
from trainer.runtime import filesystem
from trainer.training import centre_shards
from trainer.training.centre_shards import SavedRows

FOLDER = "checkpoints"
_LIST = "checkpoint"
_STAGING = "staging"
_MANIFEST = re.compile(r"ckpt-(\d{1,18})\.json")
_MAX_MANIFEST_BYTES = 1_000_000


def prefix(folder: str, step: int) -> str:
  """Returns the checkpoint's path without the extensions of its files."""
  return os.path.join(folder, f"ckpt-{step}")


def create_staging_dir(folder: str) -> str:
  """Creates the empty staging folder in which a checkpoint is written first."""
  path = os.path.join(folder, _STAGING)
  shutil.rmtree(path, ignore_errors=True)
  os.makedirs(path)
  return path


def remove_staging_dir(folder: str) -> None:
  """Removes files that could not be published."""
  shutil.rmtree(os.path.join(folder, _STAGING), ignore_errors=True)


def steps(folder: str) -> list[int]:
  """Returns the steps of the checkpoints that have a manifest, the newest first."""
  if not os.path.isdir(folder):
    return []
  matches = (_MANIFEST.fullmatch(name) for name in os.listdir(folder))
  return sorted((int(match[1]) for match in matches if match), reverse=True)


def publish(
  folder: str,
  step: int,
  notes: dict[str, int],
  shards: Optional[Mapping[str, Any]] = None,
) -> None:
  """Makes a staged checkpoint visible, whole or not at all.

  Args:
    folder: of the checkpoints.
    step: of the checkpoint.
    notes: numbers stored in the manifest.
    shards: names and facts of files of class centres, which are in the folder.

  Raises:
    OSError: a file cannot be written; checkpoints published before are unchanged.
  """
  source = os.path.join(folder, _STAGING)
  files = dict(shards or {})
  for name in _names(step):
    filesystem.sync(os.path.join(source, name))
    files[name] = centre_shards.facts(os.path.join(source, name))
  manifest = f"ckpt-{step}.json"
  content = json.dumps({"step": step, "files": files, "notes": notes}, indent=1)
  filesystem.write_bytes(os.path.join(source, manifest), content.encode())
  # Remove the manifest first: a damaged checkpoint of this step must not look valid.
  _remove(os.path.join(folder, manifest))
  for name in (*_names(step), manifest):
    os.replace(os.path.join(source, name), os.path.join(folder, name))
  filesystem.sync(folder)
  shutil.rmtree(source)


def fault(folder: str, step: int, *, checks_shards: bool = True) -> Optional[str]:
  """Returns why a checkpoint is invalid, naming the file; None if it is valid.

  Args:
    folder: of the checkpoints.
    step: one of `steps`.
    checks_shards: whether files of class centres must be valid too.
  """
  try:
    files = _read_manifest(folder, step)["files"]
    shards = shard_facts(folder, step) if checks_shards else {}
    for name in (*_names(step), *shards):
      expected = files[name]
      path = os.path.join(folder, name)
      if not os.path.isfile(path):
        return f"{path} is missing"
      size = os.path.getsize(path)
      if size != expected["bytes"]:
        return f"{path} has {size} bytes and not {expected['bytes']}"
      if centre_shards.facts(path) != expected:
        return f"{path} is damaged: its SHA-256 is another"
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    path = f"{prefix(folder, step)}.json"
    return f"{path} is damaged ({type(error).__name__}: {error})"
  except OSError as error:
    return f"{error.filename} can't be read: {error.strerror}"
  return None


def shard_facts(folder: str, step: int) -> dict[str, Any]:
  """Returns names and facts of the files of class centres of a checkpoint."""
  files = _read_manifest(folder, step)["files"]
  return {name: each for name, each in files.items() if centre_shards.is_shard(name)}


def notes(folder: str, step: int) -> dict[str, int]:
  """Returns the notes of a valid checkpoint."""
  return {k: int(v) for k, v in _read_manifest(folder, step)["notes"].items()}


class SavedCentres(NamedTuple):
  """The class centres of a checkpoint; those of the first table, if there are several.

  Attributes:
    name_hashes: [C] uint64, of the names of the classes.
    rows: of the table.
  """

  name_hashes: np.ndarray
  rows: SavedRows

  def read(self, name_hashes: np.ndarray) -> np.ndarray:
    """Returns the centres of classes, [n, k·D] float32.

    Args:
      name_hashes: [n] uint64.

    Raises:
      UserError: the checkpoint has no centres of some of them.
    """
    numbers = centre_shards.saved_numbers(self.name_hashes, name_hashes)
    num_missing = int((numbers < 0).sum())
    if num_missing:
      raise UserError(
        f"the checkpoint has no centres of {num_missing} of {len(numbers)} classes of "
        "the data; train with these classes first."
      )
    return self.rows.read(numbers)[:, 0]


def saved_centres(model_dir: str, step: int) -> SavedCentres:
  """Opens the class centres of a checkpoint.

  Args:
    model_dir: folder of the run.
    step: of one of its checkpoints.

  Raises:
    UserError: the checkpoint has no class centres, or they are damaged.
  """
  folder = os.path.join(model_dir, FOLDER)
  problem = fault(folder, step)
  if problem is not None:
    raise UserError(f"{problem}; take another checkpoint.")
  files = shard_facts(folder, step)
  if not files:
    raise UserError(
      f"{prefix(folder, step)} has no class centres; train with a loss that has them."
    )
  rows = centre_shards.saved_rows(folder, files)
  return SavedCentres(centre_shards.saved_classes(folder, files), rows[0])


def prune(folder: str, num_kept: int) -> None:
  """Removes all but the newest checkpoints, and remains of killed processes.

  Must be called after the newest was published, so that a valid one always exists.

  Args:
    folder: of the checkpoints.
    num_kept: number of checkpoints to keep.
  """
  kept = steps(folder)[:num_kept]
  for step in steps(folder)[num_kept:]:
    _remove(f"{prefix(folder, step)}.json")
  endings = re.compile(
    r"ckpt-(\d+)\.(index|data-\d+-of-\d+|(centres-|seen-|classes).*)"
  )
  for name in os.listdir(folder):
    match = endings.fullmatch(name)
    if match and int(match[1]) not in kept and int(match[1]) < max(kept):
      _remove(os.path.join(folder, name))
  _write_list(folder, kept)


def drop_after(folder: str, step: int) -> None:
  """Removes the checkpoints after a step.

  Args:
    folder: of the checkpoints.
    step: the last to keep.
  """
  for later in [each for each in steps(folder) if each > step]:
    _remove(f"{prefix(folder, later)}.json")
    for name in os.listdir(folder):
      if name.startswith(f"ckpt-{later}."):
        _remove(os.path.join(folder, name))
  if steps(folder):
    _write_list(folder, steps(folder))


def _write_list(folder: str, newest_first: Sequence[int]) -> None:
  """Writes the list by which TensorFlow itself finds the newest checkpoint."""
  lines = [f'model_checkpoint_path: "ckpt-{newest_first[0]}"']
  lines += [f'all_model_checkpoint_paths: "ckpt-{s}"' for s in reversed(newest_first)]
  path = os.path.join(folder, _LIST)
  filesystem.replace_file(path, "\n".join(lines) + "\n")


def _names(step: int) -> tuple[str, str]:
  # Names from a manifest are never used, so that no path leaves the folder.
  return f"ckpt-{step}.data-00000-of-00001", f"ckpt-{step}.index"


def _read_manifest(folder: str, step: int) -> dict[str, Any]:
  path = f"{prefix(folder, step)}.json"
  if os.path.getsize(path) > _MAX_MANIFEST_BYTES:
    raise ValueError(f"more than {_MAX_MANIFEST_BYTES} bytes")
  with open(path, encoding="utf-8") as file:
    manifest = json.load(file)
  if manifest["step"] != step:
    raise ValueError(f"it is of step {manifest['step']}")
  return manifest


def _remove(path: str) -> None:
  if os.path.exists(path):
    os.remove(path)
