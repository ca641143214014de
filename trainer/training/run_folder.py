"""The folder of a run: created, and checked for consistency."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from trainer.config import run_config
from trainer.errors import UnwritableError, UserError, short_reason
from trainer.run import Run
from trainer.runtime.lease import locked_folder
from trainer.training import checkpoint_files

# Files of a run, all readable without this package.
CONTENTS = {
  "eval/metrics.json": "results",
  "report.html": "report",
  "checkpoints": "checkpoints",
  "metrics.jsonl": "metrics by step",
  "config.gin": "configuration",
}


@contextlib.contextmanager
def open_run_folder(run: Run) -> Iterator[None]:
  """Creates the run's folder, or checks that it holds the same run; locks out others.

  Args:
    run: its `model_dir` is created if it is missing.

  Yields:
    Nothing.

  Raises:
    UserError: the folder is not writable, another process trains in it, or it contains
      a run of another configuration and `run.allow_config_change` is not set.
  """
  check_writable(run.model_dir)
  with contextlib.ExitStack() as claimed:
    try:
      claimed.enter_context(locked_folder(run.model_dir, "training in"))
    except OSError as error:
      raise UnwritableError(
        f"--model_dir={run.model_dir} can't be written to: {short_reason(error)}."
      ) from error
    run_config.check_same_config(
      run.config,
      run.model_dir,
      run.allow_config_change,
      is_resumed=bool(
        checkpoint_files.steps(os.path.join(run.model_dir, checkpoint_files.FOLDER))
      ),
    )
    yield


def check_disk(model_dir: str, *, num_bytes: int) -> None:
  """Checks that a run's checkpoints fit on the disk.

  Args:
    model_dir: folder of the run.
    num_bytes: maximum size of all checkpoints at one time, bytes. Existing checkpoints
      need no additional room.

  Raises:
    UserError: the disk has less room.
  """
  free = shutil.disk_usage(model_dir).free
  needed = num_bytes - _size(os.path.join(model_dir, "checkpoints"))
  if free < needed:
    raise UserError(
      f"{model_dir} has {free / 1e6:,.1f} MB free and the checkpoints need "
      f"{needed / 1e6:,.1f} MB more; free some disk space, or keep fewer "
      "(LoopOptions.num_checkpoints_kept)."
    )


def _size(folder: str) -> int:
  """Returns the size of the files of a folder in bytes; 0 if there is none."""
  if not os.path.isdir(folder):
    return 0
  with os.scandir(folder) as entries:
    return sum(entry.stat().st_size for entry in entries)


def check_writable(folder: str) -> None:
  """Creates a run's folder if it is missing, and checks that it is writable.

  Args:
    folder: `model_dir` of the run.

  Raises:
    UserError: files cannot be created in it.
  """
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(
      f"--model_dir={folder} can't be written to: {error.strerror}."
    ) from error
