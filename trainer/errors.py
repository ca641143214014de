"""Errors that end a run, each with the exit status that a launcher acts on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Optional

DONE = 0
FAILURE = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it.

# EFBIG is raised at a limit on file sizes.
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckFailedError(RuntimeError):
  """A check failed."""

  exit_status = FAILURE


class WorkerFailedError(RuntimeError):
  """Another worker of this run failed; its own output has the traceback."""

  exit_status = FAILURE


class UserError(ValueError):
  """A user error, reported in one line without a traceback."""

  exit_status = 2
  # Keras appends call information to errors raised in a layer unless this is set.
  _keras_call_info_injected = True


class UnwritableError(UserError):
  """A file can't be written, for example because the disk is full."""


class PreemptedError(RuntimeError):
  """The run was preempted and has saved; the same command resumes it."""

  exit_status = 3


class StalledError(RuntimeError):
  """A worker was lost or hung; the same command resumes from the checkpoint."""

  exit_status = 4


class TooFewExamplesError(UserError):
  """Mining found fewer examples than a batch needs, often after successful training."""


class NotFiniteError(RuntimeError):
  """The loss is not finite, and no update was made with it."""

  exit_status = 5


def check_at_least(name: str, value: Optional[float], least: float) -> None:
  """Raises a user error if a value is below a limit; None passes."""
  if value is not None and value < least:
    raise UserError(f"{name}={value} must be at least {least}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
  """Raises a user error if a value is not one of the choices."""
  choices = tuple(choices)
  if value not in choices:
    raise UserError(f"{name}={value!r} must be one of {', '.join(choices)}.")


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Converts an `OSError` inside the block to a user error: `path` can't be read."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror or error}.") from error


def short_reason(error: Exception) -> str:
  """Returns a short reason why a file can't be written.

  Args:
    error: `OSError`, or a TensorFlow error, whose message begins with the operation
      and the path.
  """
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return line.rsplit("; ", 1)[-1].split(" [Op:", 1)[0]


def is_out_of_space(error: BaseException) -> bool:
  """Returns whether the disk is full or a size limit is reached.

  Args:
    error: `OSError`, or a library's error whose text contains the system's reason.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _OUT_OF_SPACE
  text = str(error)
  # NumPy reports the number of items written, without the system's reason.
  is_short = isinstance(error, OSError) and "requested and" in text
  return is_short or any(os.strerror(number) in text for number in _OUT_OF_SPACE)


def out_of_space(error: BaseException) -> Optional[UnwritableError]:
  """Returns the user error for a full disk; None for any other error.

  Args:
    error: any error raised while a file is written.
  """
  if isinstance(error, UserError) or not is_out_of_space(error):
    return None
  if isinstance(error, OSError):
    path = error.filename or "a file"
    reason = error.strerror or str(error)
    text = f"{path} can't be written: {reason}"
  else:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return UnwritableError(
    f"{text}; free some disk space and run the same command again."
  )
