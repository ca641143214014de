"""Files on this machine and on remote stores (gs://, s3://, az://, hdfs://).

It has no release for Python 3.12 and later; what needs it says so there.

What is here goes straight to the system, which needs no TensorFlow; what is elsewhere
goes through `tf.io.gfile`. Failures are an `OSError` on both.

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

# Half a minute in all, which outlasts what stores themselves call transient.
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_Result = TypeVar("_Result")


def retry_with_backoff(path: str, call_fn: Callable[[], _Result]) -> _Result:
  """What a function gives, called again with back-off while the store is at fault.

  Args:
    path: what it reads, for the log.
    call_fn: raises `OSError`; EIO stands for what may pass.

  Raises:
    OSError: of another kind, or after the last time.
  """
  for wait_s in _WAITS_S:
    try:
      return call_fn()
    except OSError as error:
      if error.errno != errno.EIO:
        raise
      logging.warning("%s: %s; trying again in %g s.", path, error.strerror, wait_s)
      # Not all workers at the same moment.
      time.sleep(wait_s * random.uniform(0.5, 1.0))
  return call_fn()


def load_tensorflow_io(purpose: str) -> Any:
  """The package; importing it also registers its file systems.

  Args:
    purpose: what needs it, for the message.

  Raises:
    UserError: it is not installed, or doesn't load.
  """
  module, reason = _import()
  if module is None:
    raise UserError(
      f"{purpose} need tensorflow-io, which is not there ({reason}); install this "
      "package on Python 3.9, 3.10 or 3.11, which has it."
    )
  return module


@functools.cache
def _import() -> tuple[Any, str]:
  try:
    import tensorflow_io
  except Exception as error:  # Its compiled part raises more than ImportError.
    return None, str(error).strip().splitlines()[0]
  return tensorflow_io, ""


_NEEDS_TENSORFLOW_IO = ("s3", "az", "hdfs", "viewfs", "http", "https")
# What may pass, such as a store that is busy or out of reach, is EIO.
_REASONS = {
  "NotFoundError": errno.ENOENT,
  "PermissionDeniedError": errno.EACCES,
  "UnauthenticatedError": errno.EACCES,
  "InvalidArgumentError": errno.EINVAL,
  "OutOfRangeError": errno.EINVAL,
  "FailedPreconditionError": errno.EINVAL,
  "UnimplementedError": errno.ENOSYS,
}


class Status(NamedTuple):
  """What tells a file from what it was.

  Attributes:
    num_bytes: its size.
    modified_ns: time of its last change, nanoseconds since 1970.
  """

  num_bytes: int
  modified_ns: int


def is_remote(path: str) -> bool:
  """Whether a path is not of this machine's file system."""
  return "://" in path


def absolute(path: str) -> str:
  """The path from the root, with ~ resolved."""
  return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def open_file(path: str, mode: str) -> IO[Any]:
  """A file, opened as by `open`; text is UTF-8.

  Raises:
    OSError: it can't be opened; elsewhere some failures come on reading or closing.
  """
  if not is_remote(path):
    return open(path, mode, encoding=None if "b" in mode else "utf-8")
  with as_os_errors(path):
    return gfile(path).GFile(path, mode)


def read_bytes(path: str) -> bytes:
  """The whole content of a file."""
  if is_remote(path):
    return retry_with_backoff(path, lambda: _read_bytes(path))
  return _read_bytes(path)


def _read_bytes(path: str) -> bytes:
  with as_os_errors(path), open_file(path, "rb") as file:
    return file.read()


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file, and makes sure that it has reached the disk."""
  write_parts(path, (content,))


def write_parts(path: str, parts: Iterable[bytes]) -> None:
  """As `write_bytes`, of parts that are made while it is written."""
  if path.startswith("ram://") and exists(path):
    gfile(path).remove(path)  # Or it would be written on at its end.
  with as_os_errors(path), open_file(path, "wb") as file:
    for part in parts:
      file.write(part)
    file.flush()
    if not is_remote(path):
      os.fsync(file.fileno())


def replace_file(path: str, content: Union[bytes, str]) -> None:
  """Writes a file whole or not at all, over one that exists.

  Args:
    path: of the file; its folder exists.
    content: text is written as UTF-8.

  Raises:
    OSError: it can't be written, naming `path`; the file is unchanged.
  """
  with replacing(path) as staged:
    write_bytes(staged, content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Replaces a file by the one that the block writes, if the block raises nothing.

  A reader sees the old file or the new one, whole. Processes that replace the same file
  at once each write a file of their own: the last to finish wins.

  Args:
    path: of the file; its folder exists.

  Yields:
    The path to write, in the same folder.

  Raises:
    OSError: it can't be written, naming `path`; the file is unchanged.
  """
  staged = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.new"
  try:
    yield staged
    if not is_remote(path):
      _sync(staged)
    move(staged, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      remove(staged)
    if isinstance(error, OSError):
      error.filename = path
    raise
  if not is_remote(path):
    with contextlib.suppress(OSError):  # Some file systems do not sync folders.
      _sync(os.path.dirname(path) or ".")


def _sync(path: str) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def status(path: str) -> Status:
  """Size and time of a file."""
  if not is_remote(path):
    found = os.stat(path)
    return Status(found.st_size, found.st_mtime_ns)
  return retry_with_backoff(path, lambda: _remote_status(path))


def _remote_status(path: str) -> Status:
  with as_os_errors(path):
    found = gfile(path).stat(path)
    return Status(found.length, found.mtime_nsec)


def exists(path: str) -> bool:
  """Whether there is such a file or folder."""
  if not is_remote(path):
    return os.path.exists(path)
  with as_os_errors(path):
    return gfile(path).exists(path)


def is_folder(path: str) -> bool:
  """Whether there is a folder of that name."""
  if not is_remote(path):
    return os.path.isdir(path)
  with as_os_errors(path):
    return gfile(path).isdir(path)


def list_folder(path: str) -> list[str]:
  """The names in a folder, sorted."""
  if not is_remote(path):
    return sorted(os.listdir(path))
  with as_os_errors(path):
    return sorted(name.rstrip("/") for name in gfile(path).listdir(path))


def list_folders(path: str) -> list[str]:
  """The names of the folders in a folder, sorted."""
  if not is_remote(path):
    with os.scandir(path) as entries:
      return sorted(entry.name for entry in entries if _is_dir(entry))
  with as_os_errors(path):
    is_folder = gfile(path).isdir
    return [n for n in list_folder(path) if is_folder(os.path.join(path, n))]


def _is_dir(entry: os.DirEntry) -> bool:
  """Whether it is a folder; a link that can't be followed is none."""
  try:
    return entry.is_dir()
  except OSError:
    return False


def matching(pattern: str) -> list[str]:
  """The paths that match a pattern, sorted."""
  if not is_remote(pattern):
    return sorted(local_glob.glob(pattern))
  with as_os_errors(pattern):
    return sorted(gfile(pattern).glob(pattern))


def make_folder(path: str) -> None:
  """Makes a folder and those above it; one that is there is left."""
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
  """Renames a file, over one that is there."""
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


def remove_folder(path: str) -> None:
  """Removes a folder with all in it, if it is there."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(FileNotFoundError), as_os_errors(path):
    gfile(path).rmtree(path)


def gfile(path: str) -> Any:
  """`tf.io.gfile`, with the file systems that TensorFlow alone does not know."""
  import tensorflow as tf  # Late: local paths need none.

  if path.split("://", maxsplit=1)[0] in _NEEDS_TENSORFLOW_IO:
    pass

    load_tensorflow_io(f"paths such as {path}")
  return tf.io.gfile


@contextlib.contextmanager
def as_os_errors(path: str) -> Iterator[None]:
  """Failures of TensorFlow's file systems as `OSError`."""
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


# Requests at once: their time is mostly waiting.
_NUM_THREADS = 32


def read_range(path: str, offset: int, num_bytes: int) -> bytes:
  """Some bytes of a file; fewer where it ends before.

  Raises:
    OSError: it can't be read, tried again where that may pass.
  """
  return retry_with_backoff(path, lambda: _read_once(path, offset, num_bytes))


def _read_once(path: str, offset: int, num_bytes: int) -> bytes:
  # TensorFlow's own file object would fetch 512 kB for each record.
  from tensorflow.python.lib.io import _pywrap_file_io

  with as_os_errors(path):
    gfile(path)
    stream = _pywrap_file_io.BufferedInputStream(path, num_bytes)
    stream.seek(offset)
    return stream.read(num_bytes)


def in_parallel(read_fn: Callable[..., bytes], arguments: Iterable[Any]) -> list[bytes]:
  """What a function gives for each of n tuples of arguments, in their order."""
  return list(_threads().map(lambda each: read_fn(*each), arguments))


@functools.cache
def _threads() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_NUM_THREADS, "remote reads")


_BLOCK_BYTES = 1 << 20


def sha256_of(path: str) -> str:
  """SHA-256 of a file's content, in hexadecimal."""
  contents = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(_BLOCK_BYTES):
      contents.update(block)
  return contents.hexdigest()
