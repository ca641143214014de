"""The processes of a run: which is the chief, and what they tell each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Callable

import numpy as np
import tensorflow as tf

from trainer.data.pipeline import Shard
from trainer.distribute.collectives import current_collectives
from trainer.distribute.rendezvous import differences
from trainer.errors import UserError


class Workers:
  """The workers of the strategy in whose scope it is made; one, where it is local.

  Attributes:
    index: number of this worker; the chief is 0.
    num_workers: how many there are.
    num_local_replicas: replicas of each.
  """

  def __init__(self):
    self._strategy = tf.distribute.get_strategy()
    resolver = self._strategy.cluster_resolver
    is_many = isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)
    self.index = resolver.task_id if is_many else 0
    self.num_workers = (
      resolver.cluster_spec().num_tasks(resolver.task_type) if is_many else 1
    )
    self.num_local_replicas = self._strategy.num_replicas_in_sync // self.num_workers

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what the run leaves."""
    return self.index == 0

  def shard(self) -> Shard:
    """The part of every global batch that this worker reads."""
    num_local = self.num_local_replicas
    return Shard(self.index * num_local, num_local, num_local * self.num_workers)

  def exchange(self, text: str) -> list[str]:
    """Tells all workers something, and waits to hear from all.

    Args:
      text: of this worker.

    Returns:
      The texts of all workers, in order.
    """
    if self.num_workers == 1:
      return [text]
    content = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    sizes = self._gather(np.array([len(content)], np.int32))[:, 0]
    rows = self._gather(np.pad(content, (0, max(1, sizes.max()) - len(content))))
    return [
      row[:size].astype(np.uint8).tobytes().decode() for row, size in zip(rows, sizes)
    ]

  def agree(self, facts: Mapping[str, object]) -> None:
    """Checks that something is alike on all workers.

    Args:
      facts: by name.

    Raises:
      UserError: it is not; on every worker.
    """
    text = json.dumps({name: str(fact) for name, fact in facts.items()})
    difference = differences([json.loads(each) for each in self.exchange(text)])
    if difference:
      raise UserError(difference)

  def chief_first(self, act: Callable[[], None]) -> None:
    """Lets the chief do something while the others wait.

    Args:
      act: what only one process may do.

    Raises:
      UserError: it raised one on the chief; then on every worker.
    """
    mistake = ""
    if self.is_chief:
      try:
        act()
      except UserError as error:
        if self.num_workers == 1:
          raise
        mistake = str(error)
    mistake = self.exchange(mistake)[0]
    if mistake:
      raise UserError(mistake)

  def wait(self) -> None:
    """Waits for all workers: where one that ends would take its part from others."""
    self.exchange("")

  def _gather(self, row: np.ndarray) -> np.ndarray:
    """[n] int32 of each worker to [num_workers, n]."""
    gathered = self._strategy.run(
      lambda: current_collectives().gather(tf.constant(row[None]))
    )
    rows = self._strategy.experimental_local_results(gathered)[0].numpy()
    return rows[:: self.num_local_replicas]
