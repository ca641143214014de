"""Ranged reads of files elsewhere, some at once.

Shapes: n reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

from trainer.data import paths, retry

# Requests at once: their time is mostly waiting.
_NUM_THREADS = 32


def read_range(path: str, offset: int, num_bytes: int) -> bytes:
  """Some bytes of a file; fewer where it ends before.

  Raises:
    OSError: it can't be read, tried again where that may pass.
  """
  return retry.patiently(path, lambda: _read_once(path, offset, num_bytes))


def _read_once(path: str, offset: int, num_bytes: int) -> bytes:
  # TensorFlow's own file object would fetch 512 kB for each record.
  from tensorflow.python.lib.io import _pywrap_file_io

  with paths.as_os_errors(path):
    paths.gfile(path)
    stream = _pywrap_file_io.BufferedInputStream(path, num_bytes)
    stream.seek(offset)
    return stream.read(num_bytes)


def in_parallel(read_fn: Callable[..., bytes], arguments: Iterable[Any]) -> list[bytes]:
  """What a function gives for each of n tuples of arguments, in their order."""
  return list(_threads().map(lambda each: read_fn(*each), arguments))


@functools.cache
def _threads() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_NUM_THREADS, "remote reads")
