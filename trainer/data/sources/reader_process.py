"""Reading of a file in a child process, so that a crash ends only that process.

The C libraries that read Parquet, LMDB and HDF5 abort or crash on some damaged files. A
reader is a function of this package that yields messages. It runs in the child process
and sends its messages over a pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pathlib
import select
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Any, Callable, Optional

from trainer.errors import UserError, reading
from trainer.runtime import filesystem

# A header of JSON values, and byte strings.
Message = tuple[dict[str, Any], Sequence[bytes]]
Reader = Callable[..., Iterator[Message]]

_PACKAGE_ROOT = str(pathlib.Path(__file__).parents[3])
_LENGTH = struct.Struct("<Q")
# Longest wait for a message: libraries loop forever on some damaged files.
_TIMEOUT_S = 300.0
_END, _REFUSED, _FAILED = "end", "refused", "failed"


def read(reader: Reader, path: str, *arguments: Any) -> Iterator[Message]:
  """Runs a reader of one file in a child process.

  Args:
    reader: function of a module of this package. Its arguments are the path of a local
      file, `path` for messages, and `arguments`.
    path: path of the file; a remote file is first copied to a temporary one.
    arguments: JSON values.

  Yields:
    The messages of the reader.

  Raises:
    UserError: the file can't be read, or the child died or hung while reading it.
  """
  with reading(path), local_file(path) as local:
    yield from _messages(reader, path, [local, path, *arguments])


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
  """Returns the path of a local file with the same content; removes a copy at the end.

  Raises:
    OSError: the file can't be read, or the copy can't be written.
  """
  if not filesystem.is_remote(path):
    with open(path, "rb"):
      pass  # Raises here, with a reason, if the file is missing or a folder.
    yield path
    return
  from trainer.data import index_arrays  # Late: requires a POSIX system.

  with index_arrays.temporary_copy(path) as copy:
    yield copy


def _messages(reader: Reader, path: str, arguments: Sequence[Any]) -> Iterator[Message]:
  process = _start(f"{reader.__module__}:{reader.__qualname__}")
  assert process.stdin and process.stdout
  try:
    with contextlib.suppress(BrokenPipeError):  # A dead child is reported below.
      process.stdin.write(json.dumps(arguments).encode())
      process.stdin.close()
    pipe = io.BufferedReader(_PipeWithDeadline(process.stdout.fileno()), 1 << 16)
    while True:
      message = _receive(pipe)
      if message is None:
        raise UserError(_exit_error(path, process.wait()))
      header, _ = message
      if _REFUSED in header:
        raise UserError(header[_REFUSED])
      if _FAILED in header:
        raise RuntimeError(f"reading {path} failed:\n{header[_FAILED]}")
      if _END in header:
        return
      yield message
  except TimeoutError as error:
    raise UserError(
      f"{path} can't be read: it is damaged (its reader made no progress for "
      f"{_TIMEOUT_S:g} s)."
    ) from error
  finally:
    process.kill()
    process.stdout.close()
    process.wait()


class _PipeWithDeadline(io.RawIOBase):
  """Pipe reader that raises TimeoutError if nothing arrives in time."""

  def __init__(self, descriptor: int):
    self._descriptor = descriptor

  def readable(self) -> bool:
    """Returns true."""
    return True

  def readinto(self, buffer) -> int:
    """Waits for some bytes, and returns their number; 0 at the end."""
    if hasattr(select, "poll"):  # On POSIX systems.
      poll = select.poll()
      poll.register(self._descriptor, select.POLLIN)
      if not poll.poll(1000 * _TIMEOUT_S):
        raise TimeoutError
    content = os.read(self._descriptor, len(buffer))
    buffer[: len(content)] = content
    return len(content)


def _start(name: str) -> subprocess.Popen[bytes]:
  """Starts the child in its own session, so that Ctrl-C reaches only the parent."""
  search = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
  return subprocess.Popen(
    [sys.executable, "-m", "trainer.data.sources.reader_process", name],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,  # C libraries print to it when they abort.
    cwd=_PACKAGE_ROOT,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
    start_new_session=True,
  )


def _exit_error(path: str, status: int) -> str:
  if -status == getattr(signal, "SIGKILL", None):
    return f"{path} can't be read: its reader was killed, perhaps for lack of memory."
  reason = f"exit status {status}"
  if status < 0:
    with contextlib.suppress(ValueError):
      reason = signal.Signals(-status).name
  return f"{path} can't be read: it is damaged (its reader ended with {reason})."


def _send(file: IO[bytes], header: dict[str, Any], parts: Sequence[bytes]) -> None:
  fields = [json.dumps(header).encode(), *parts]
  file.write(_LENGTH.pack(len(fields)))
  for field in fields:
    file.write(_LENGTH.pack(len(field)))
    file.write(field)
  file.flush()


def _receive(file: IO[bytes]) -> Optional[Message]:
  """Receives the next message; returns None if the sender has died."""
  fields = []
  num_fields = _receive_length(file)
  for _ in range(num_fields or 0):
    length = _receive_length(file)
    field = b"" if length is None else file.read(length)
    if length is None or len(field) < length:
      return None
    fields.append(field)
  return (json.loads(fields[0]), fields[1:]) if fields else None


def _receive_length(file: IO[bytes]) -> Optional[int]:
  content = file.read(_LENGTH.size)
  return _LENGTH.unpack(content)[0] if len(content) == _LENGTH.size else None


def _limit_memory() -> None:
  """Limits the process to half of the memory, if the system supports it.

  A damaged file may declare any size. Mapped files do not count.
  """
  # If memory still runs out, Linux ends this process rather than the parent.
  with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource  # POSIX only.

    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
  """Runs the reader named on the command line; sends its messages to the parent."""
  _limit_memory()
  pipe = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # Output of libraries must not mix with the messages.
  try:
    module, name = sys.argv[1].split(":")
    reader = getattr(importlib.import_module(module), name)
    arguments = json.load(sys.stdin)
    for header, parts in reader(*arguments):
      _send(pipe, header, parts)
    _send(pipe, {_END: True}, ())
  except BrokenPipeError:
    pass  # The parent has closed the pipe.
  except MemoryError:
    reason = "it takes more than half of the memory, or is damaged"
    _send(pipe, {_REFUSED: f"{arguments[1]} can't be read: {reason}."}, ())
  except UserError as error:
    _send(pipe, {_REFUSED: str(error)}, ())
  except Exception:
    _send(pipe, {_FAILED: traceback.format_exc()}, ())


if __name__ == "__main__":
  main()
