"""Files on this machine and on remote stores (gs://, s3://, az://, hdfs://).

Local paths use the operating system directly, without TensorFlow. Remote paths use
`tf.io.gfile`; all but gs:// need tensorflow-io. tensorflow-io has no release for Python
3.12 and later, and functions that need it raise an error there. Failures are `OSError`
for both kinds of path.

Shapes: n reads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob as local_glob
import hashlib
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import IO, Any, NamedTuple, TypeVar, Union

from absl import logging

from trainer.errors import UserError
from trainer.runtime import tensorflow_private

# About half a minute in total, longer than failures that stores call transient.
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_Result = TypeVar("_Result")

_NEEDS_TENSORFLOW_IO = ("s3", "az", "hdfs", "viewfs", "http", "https")
# Errors that are not listed here, such as an unavailable store, are transient: EIO.
_REASONS = {
  "NotFoundError": errno.ENOENT,
  "PermissionDeniedError": errno.EACCES,
  "UnauthenticatedError": errno.EACCES,
  "InvalidArgumentError": errno.EINVAL,
  "OutOfRangeError": errno.EINVAL,
  "FailedPreconditionError": errno.EINVAL,
  "UnimplementedError": errno.ENOSYS,
}

# Concurrent requests: most of their time is waiting.
_NUM_THREADS = 32

_BLOCK_BYTES = 1 << 20

_OLD = ".old"


def retry_with_backoff(path: str, call_fn: Callable[[], _Result]) -> _Result:
  """Calls a function, and again with exponential back-off after transient failures.

  Args:
    path: the file that it reads, for the log.
    call_fn: raises `OSError`; EIO marks a transient failure.

  Returns:
    The result of the function.

  Raises:
    OSError: another error than EIO, or EIO at the last attempt.
  """
  for wait_s in _WAITS_S:
    try:
      return call_fn()
    except OSError as error:
      if error.errno != errno.EIO:
        raise
      logging.warning("%s: %s; retrying in %g s.", path, error.strerror, wait_s)
      # Jitter, so that workers don't retry at the same moment.
      time.sleep(wait_s * random.uniform(0.5, 1.0))
  return call_fn()


def load_tensorflow_io(purpose: str) -> Any:
  """Returns the tensorflow-io package; importing it registers its file systems.

  Args:
    purpose: the feature that needs it, for the message.

  Raises:
    UserError: it is not installed, or can't be loaded.
  """
  module, reason = _import()
  if module is None:
    raise UserError(
      f"{purpose} need tensorflow-io, which is not available ({reason}); install this "
      "package on Python 3.9, 3.10 or 3.11, which support it."
    )
  return module


@functools.cache
def _import() -> tuple[Any, str]:
  try:
    import tensorflow_io
  except Exception as error:  # Its compiled part raises more than ImportError.
    return None, str(error).strip().splitlines()[0]
  return tensorflow_io, ""


class Status(NamedTuple):
  """Size and modification time of a file, which detect a change.

  Attributes:
    num_bytes: size, bytes.
    modified_ns: time of the last change, nanoseconds since 1970.
  """

  num_bytes: int
  modified_ns: int


def is_remote(path: str) -> bool:
  """Returns whether a path is on a remote store."""
  return "://" in path


def absolute(path: str) -> str:
  """Returns the absolute path, with ~ expanded."""
  return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def open_file(path: str, mode: str) -> IO[Any]:
  """Opens a file as `open` does; text is UTF-8.

  Raises:
    OSError: it can't be opened; for remote files also on reading or closing.
  """
  if not is_remote(path):
    return open(path, mode, encoding=None if "b" in mode else "utf-8")
  with as_os_errors(path):
    return gfile(path).GFile(path, mode)


def read_bytes(path: str) -> bytes:
  """Returns the content of a file."""
  if is_remote(path):
    return retry_with_backoff(path, lambda: _read_bytes(path))
  return _read_bytes(path)


def _read_bytes(path: str) -> bytes:
  with as_os_errors(path), open_file(path, "rb") as file:
    return file.read()


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file and flushes it to the disk."""
  write_parts(path, (content,))


def write_parts(path: str, parts: Iterable[bytes]) -> None:
  """Writes a file as `write_bytes` does, from an iterable of parts."""
  if path.startswith("ram://") and exists(path):
    gfile(path).remove(path)  # Otherwise the file would be appended to.
  with as_os_errors(path), open_file(path, "wb") as file:
    for part in parts:
      file.write(part)
    file.flush()
    if not is_remote(path):
      os.fsync(file.fileno())


def replace_file(path: str, content: Union[bytes, str]) -> None:
  """Writes or replaces a file atomically.

  Args:
    path: path of the file; its folder exists.
    content: text is written as UTF-8.

  Raises:
    OSError: it can't be written; the error names `path`, and the file is unchanged.
  """
  with replacing(path) as staged:
    write_bytes(staged, content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Replaces a file with the one that the block writes, unless the block raises.

  A reader sees either the complete old file or the complete new one. Processes that
  replace the same file concurrently each write a separate file; the last to finish
  wins.

  Args:
    path: path of the file; its folder exists.

  Yields:
    The path to write, in the same folder.

  Raises:
    OSError: it can't be written; the error names `path`, and the file is unchanged.
  """
  staged = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.new"
  try:
    yield staged
    if not is_remote(path):
      sync(staged)
    move(staged, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      remove(staged)
    if isinstance(error, OSError):
      error.filename = path
    raise
  if not is_remote(path):
    with contextlib.suppress(OSError):  # Some file systems can't sync folders.
      sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
  """Waits until a local file or folder is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def status(path: str) -> Status:
  """Returns size and modification time of a file."""
  if not is_remote(path):
    found = os.stat(path)
    return Status(found.st_size, found.st_mtime_ns)
  return retry_with_backoff(path, lambda: _remote_status(path))


def _remote_status(path: str) -> Status:
  with as_os_errors(path):
    found = gfile(path).stat(path)
    return Status(found.length, found.mtime_nsec)


def exists(path: str) -> bool:
  """Returns whether a file or folder exists."""
  if not is_remote(path):
    return os.path.exists(path)
  with as_os_errors(path):
    return gfile(path).exists(path)


def is_folder(path: str) -> bool:
  """Returns whether a folder exists."""
  if not is_remote(path):
    return os.path.isdir(path)
  with as_os_errors(path):
    return gfile(path).isdir(path)


def list_folder(path: str) -> list[str]:
  """Returns the names in a folder, sorted."""
  if not is_remote(path):
    return sorted(os.listdir(path))
  with as_os_errors(path):
    return sorted(name.rstrip("/") for name in gfile(path).listdir(path))


def list_folders(path: str) -> list[str]:
  """Returns the names of the subfolders of a folder, sorted."""
  if not is_remote(path):
    with os.scandir(path) as entries:
      return sorted(entry.name for entry in entries if _is_dir(entry))
  with as_os_errors(path):
    is_folder = gfile(path).isdir
    return [n for n in list_folder(path) if is_folder(os.path.join(path, n))]


def _is_dir(entry: os.DirEntry) -> bool:
  """Returns whether an entry is a folder; false for a broken link."""
  try:
    return entry.is_dir()
  except OSError:
    return False


def matching(pattern: str) -> list[str]:
  """Returns the paths that match a glob pattern, sorted."""
  if not is_remote(pattern):
    return sorted(local_glob.glob(pattern))
  with as_os_errors(pattern):
    return sorted(gfile(pattern).glob(pattern))


def make_folder(path: str) -> None:
  """Creates a folder and its parents; existing folders are kept."""
  if not is_remote(path):
    try:
      os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
      reason = os.strerror(errno.ENOTDIR)
      raise NotADirectoryError(errno.ENOTDIR, reason, path) from error
    return
  with as_os_errors(path):
    gfile(path).makedirs(path)


def move(source: str, target: str) -> None:
  """Renames a file and replaces an existing target."""
  if not is_remote(source):
    os.replace(source, target)
    return
  with as_os_errors(source):
    gfile(source).rename(source, target, overwrite=True)


def remove(path: str) -> None:
  """Removes a file."""
  if not is_remote(path):
    os.remove(path)
    return
  with as_os_errors(path):
    gfile(path).remove(path)


def replace_folder(staged: str, folder: str) -> None:
  """Moves a complete local folder into place and replaces an existing one.

  The old folder is kept as `folder`.old until the new one is in place, so that
  `current_folder` returns a complete one after a crash at any time. Processes that have
  files of the old one open can keep using them.

  Args:
    staged: the new folder, on the same file system.
    folder: the folder to replace.

  Raises:
    OSError: it can't be moved; the old folder is in place.
  """
  recover_folder(folder)
  if os.path.isdir(folder):
    os.replace(folder, folder + _OLD)
  try:
    os.replace(staged, folder)
  finally:
    recover_folder(folder)


def recover_folder(folder: str) -> None:
  """Completes or reverts a `replace_folder` that was interrupted."""
  if not os.path.isdir(folder) and os.path.isdir(folder + _OLD):
    os.replace(folder + _OLD, folder)
  remove_folder(folder + _OLD)


def current_folder(folder: str) -> str:
  """Returns the path of a folder that `replace_folder` may be replacing."""
  is_between = not os.path.isdir(folder) and os.path.isdir(folder + _OLD)
  return folder + _OLD if is_between else folder


def remove_folder(path: str) -> None:
  """Removes a folder and its content, if it exists."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(FileNotFoundError), as_os_errors(path):
    gfile(path).rmtree(path)


def gfile(path: str) -> Any:
  """Returns `tf.io.gfile`, with tensorflow-io's file systems if the path needs them."""
  import tensorflow as tf  # Late: local paths don't need TensorFlow.

  if path.split("://", maxsplit=1)[0] in _NEEDS_TENSORFLOW_IO:
    load_tensorflow_io(f"paths such as {path}")
  return tf.io.gfile


@contextlib.contextmanager
def as_os_errors(path: str) -> Iterator[None]:
  """Converts errors of TensorFlow's file systems in the block to `OSError`."""
  if not is_remote(path):
    yield
    return
  import tensorflow as tf

  try:
    yield
  except tf.errors.OpError as error:
    number = _REASONS.get(type(error).__name__, errno.EIO)
    has_name = number in (errno.ENOENT, errno.EACCES)
    reason = os.strerror(number) if has_name else error.message
    raise OSError(number, reason, path) from error


def read_range(path: str, offset: int, num_bytes: int) -> bytes:
  """Reads some bytes of a file; fewer at the end of the file.

  Raises:
    OSError: it can't be read; transient failures are retried.
  """
  return retry_with_backoff(path, lambda: _read_once(path, offset, num_bytes))


def _read_once(path: str, offset: int, num_bytes: int) -> bytes:
  with as_os_errors(path):
    gfile(path)
    stream = tensorflow_private.open_unbuffered(path, num_bytes)
    stream.seek(offset)
    return stream.read(num_bytes)


def in_parallel(read_fn: Callable[..., bytes], arguments: Iterable[Any]) -> list[bytes]:
  """Calls a function with each of n argument tuples; returns the results in order."""
  return list(_threads().map(lambda each: read_fn(*each), arguments))


@functools.cache
def _threads() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_NUM_THREADS, "remote reads")


def sha256_of(path: str) -> str:
  """Returns the SHA-256 of a file's content, in hexadecimal."""
  if is_remote(path):
    return retry_with_backoff(path, lambda: _sha256_of(path))
  return _sha256_of(path)


def _sha256_of(path: str) -> str:
  contents = hashlib.sha256()
  with as_os_errors(path), open_file(path, "rb") as file:
    while block := file.read(_BLOCK_BYTES):
      contents.update(block)
  return contents.hexdigest()
