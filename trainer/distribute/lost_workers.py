"""What TensorFlow says when a worker is lost, in one line and an exit status."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf

from trainer.distribute.cluster import find_cluster
from trainer.errors import StalledError

_LOST = (
  tf.errors.UnavailableError,
  tf.errors.AbortedError,
  tf.errors.DeadlineExceededError,
)
_NUM_CHARACTERS = 200


@contextlib.contextmanager
def naming_lost_workers() -> Iterator[None]:
  """Says which worker was lost, where several train together.

  Yields:
    Nothing.

  Raises:
    StalledError: a worker was lost inside.
  """
  try:
    yield
  except _LOST as error:
    cluster = find_cluster(os.environ)
    if cluster is None or cluster.num_workers == 1:
      raise
    text = str(error)
    others = sorted({int(n) for n in re.findall(r"task:(\d+)", text)} - {cluster.index})
    names = [f"{i} ({cluster.addresses[i]})" for i in others if i < cluster.num_workers]
    reason = " ".join(text.split())[:_NUM_CHARACTERS]
    raise StalledError(
      f"lost worker {', '.join(names) or 'unknown'}: {reason}; the same command "
      "continues from the newest checkpoint."
    ) from error
