"""Tries again what a store elsewhere fails to do for the moment."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

# Half a minute in all, which outlasts what stores themselves call transient.
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_Result = TypeVar("_Result")


def patiently(path: str, call_fn: Callable[[], _Result]) -> _Result:
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
