"""Whether a function is traced for a machine with an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

# Whether what is traced now is for another machine, which has one.
_traced_for_accelerator: list[bool] = []


@contextlib.contextmanager
def for_accelerator() -> Iterator[None]:
  """Chooses, while a function is traced, as on a machine with an accelerator.

  Yields:
    Nothing.
  """
  _traced_for_accelerator.append(True)
  try:
    yield
  finally:
    _traced_for_accelerator.pop()


def is_accelerated() -> bool:
  """Whether the machine that is traced for has one."""
  if _traced_for_accelerator:
    return True
  return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())
