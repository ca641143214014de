"""Errors that end a run, each with the exit status that tells a launcher what to do."""

from __future__ import annotations

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
