"""An iterator over replica batches that is let go without a wait.

tf.data tunes itself at intervals that double, up to a minute, and whoever deletes an
iterator over devices waits for the next of them: about as long as it ran. So that is
left to a thread.
"""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf

from trainer import leaving


class ReplicaBatches:
  """Batches for replicas.

  Args:
    strategy: the replicas.
    dataset: a batch for each replica of this worker in turn, of static shapes.
  """

  def __init__(self, strategy: tf.distribute.Strategy, dataset: tf.data.Dataset):
    self._held = [iter(strategy.distribute_datasets_from_function(lambda _: dataset))]
    weakref.finalize(self, leaving.let_go, self._held).atexit = False

  @property
  def iterator(self) -> Any:
    """The distributed iterator; not to be kept longer than this."""
    return self._held[0]
