"""Keeps two processes from writing into the same folder of data."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from absl import logging

from trainer.data import claim, paths
from trainer.errors import UserError


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
  """Keeps other processes of this machine from writing into a folder.

  Args:
    folder: it exists; for one elsewhere, see `claim`.

  Yields:
    Nothing.

  Raises:
    UserError: another process writes into it.
    OSError: it can't be opened.
  """
  if paths.is_remote(folder):
    with claim.claiming(folder, "ingesting into"):
      yield
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"Another process is ingesting into {folder}; wait for it, or choose another "
        "folder."
      ) from error
    except OSError as error:  # Some network file systems lock no folders.
      logging.warning("%s can't be locked: %s.", folder, error.strerror)
    yield
  finally:
    os.close(descriptor)
