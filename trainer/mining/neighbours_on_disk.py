"""Room for the neighbours of all items in a temporary file, claimed before it is used.

Shapes: N items, k neighbours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import numpy as np

from trainer.errors import UserError, reason_of
from trainer.retrieval.search import Neighbours


@contextlib.contextmanager
def on_disk(num_items: int, num_neighbours: int) -> Iterator[Neighbours]:
  """Arrays that a search can fill, mapped from a file that goes with the context.

  Args:
    num_items: N.
    num_neighbours: k.

  Yields:
    Indices [N, k] int32 and distances [N, k] float32.

  Raises:
    UserError: the temporary folder has no room for them, 8·N·k bytes.
  """
  shape = (num_items, num_neighbours)
  num_bytes = 4 * num_items * num_neighbours
  with contextlib.ExitStack() as opened:
    try:
      file = opened.enter_context(tempfile.TemporaryFile())
      _claim(file.fileno(), 2 * num_bytes)
      found = Neighbours(
        np.memmap(file, np.int32, "r+", 0, shape),
        np.memmap(file, np.float32, "r+", num_bytes, shape),
      )
    except OSError as error:
      folder = tempfile.tempdir or os.environ.get("TMPDIR", "the temporary folder")
      raise UserError(
        f"{folder} has no room for {2 * num_bytes:,} bytes of neighbours "
        f"({reason_of(error)}); set TMPDIR to a folder that has, or mine among fewer "
        "(Miner.records_per_class)."
      ) from error
    yield found


def _claim(descriptor: int, num_bytes: int) -> None:
  """Gives a file its size on the disk: a full one kills who writes into a map of it."""
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(descriptor, 0, num_bytes)
  else:  # macOS has none.
    os.truncate(descriptor, num_bytes)
