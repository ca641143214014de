"""Errors that end a run, each with the exit status that tells a launcher what to do."""

from __future__ import annotations

import errno
import os
from typing import Optional

DONE = 0
FAILURE = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it.


class CheckFailedError(RuntimeError):
  """What was checked is not as it should be."""

  exit_status = FAILURE


class WorkerFailedError(RuntimeError):
  """Another worker of this run failed, which shows a traceback of its own."""

  exit_status = FAILURE


class UserError(ValueError):
  """The user's mistake: shown as one line, without a traceback."""

  exit_status = 2
  # Keras adds to what is raised in a layer how it was called, unless it has done so.
  _keras_call_info_injected = True


class UnwritableError(UserError):
  """A file can't be written, as on a full disk."""


class PreemptedError(RuntimeError):
  """The run was told to stop and has saved; the same command continues it."""

  exit_status = 3


class StalledError(RuntimeError):
  """A worker was lost or hung; the same command continues from the checkpoint."""

  exit_status = 4


class TooFewExamplesError(UserError):
  """Mining found fewer examples than a batch has: often because training went well."""


class NotFiniteError(RuntimeError):
  """The loss is not finite, and no update was made with it."""

  exit_status = 5


def reason_of(error: Exception) -> str:
  """Why a file can't be written, in few words, whoever says so.

  Args:
    error: `OSError`, or TensorFlow's, which tells the operation and the path before.
  """
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return line.rsplit("; ", 1)[-1].split(" [Op:", 1)[0]


# The last is of a limit on the size of files.
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_space(error: BaseException) -> bool:
  """Returns whether an error means that no disk space is left, or a limit is reached.

  Args:
    error: `OSError`, or that of a library which gives the system's reason in its text.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _OUT_OF_SPACE
  text = str(error)
  # NumPy counts what it wrote, without the system's reason.
  is_short = isinstance(error, OSError) and "requested and" in text
  return is_short or any(os.strerror(number) in text for number in _OUT_OF_SPACE)


def out_of_space(error: BaseException) -> Optional[UnwritableError]:
  """Returns the user error for a full disk; None if the reason is another.

  Args:
    error: whatever was raised where a file is written.
  """
  if isinstance(error, UserError) or not is_out_of_space(error):
    return None
  if isinstance(error, OSError):
    path = error.filename or "a file"
    reason = error.strerror or str(error)
    text = f"{path} can't be written: {reason}"
  else:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return UnwritableError(f"{text}; free some disk, and run the same command again.")
