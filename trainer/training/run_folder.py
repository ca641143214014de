"""The folder of a run: made, and checked against what it holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from trainer.config import run_config
from trainer.errors import UnwritableError, UserError, reason_of
from trainer.run import Run
from trainer.runtime.lease import locked_folder
from trainer.training import checkpoint_files

# What a run leaves, all readable without this package.
CONTENTS = {
  "eval/metrics.json": "results",
  "report.html": "report",
  "checkpoints": "checkpoints",
  "metrics.jsonl": "metrics by step",
  "config.gin": "configuration",
}


@contextlib.contextmanager
def open_run_folder(run: Run) -> Iterator[None]:
  """Makes the run's folder, or checks that it holds the same run; keeps others out.

  Args:
    run: its `model_dir` is made if it is missing.

  Yields:
    Nothing.

  Raises:
    UserError: the folder can't be written to, another process trains in it, or it holds
      a run of another configuration and `run.allow_config_change` is not set.
  """
  check_writable(run.model_dir)
  with contextlib.ExitStack() as claimed:
    try:
      claimed.enter_context(locked_folder(run.model_dir, "training in"))
    except OSError as error:
      raise UnwritableError(
        f"--model_dir={run.model_dir} can't be written to: {reason_of(error)}."
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
  """Checks that a run's checkpoints will fit.

  Args:
    model_dir: folder of the run.
    num_bytes: size of all checkpoints that will be there at once. Those that are there
      already need no more room.

  Raises:
    UserError: the disk has less.
  """
  free = shutil.disk_usage(model_dir).free
  needed = num_bytes - _size(os.path.join(model_dir, "checkpoints"))
  if free < needed:
    raise UserError(
      f"{model_dir} has {free / 1e6:,.1f} MB free and the checkpoints need "
      f"{needed / 1e6:,.1f} MB more; free some, or keep fewer "
      "(LoopOptions.num_checkpoints_kept)."
    )


def _size(folder: str) -> int:
  """Bytes of the files of a folder; 0 where there is none."""
  if not os.path.isdir(folder):
    return 0
  with os.scandir(folder) as entries:
    return sum(entry.stat().st_size for entry in entries)


def check_writable(folder: str) -> None:
  """Makes a run's folder if it is missing, and checks that files can be made in it.

  Args:
    folder: `model_dir` of the run.

  Raises:
    UserError: they can't.
  """
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(
      f"--model_dir={folder} can't be written to: {error.strerror}."
    ) from error
