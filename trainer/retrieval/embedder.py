"""Embeddings of records, computed on all replicas.

Shapes: N records, D dimensions, B records of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import numpy as np
import tensorflow as tf

from trainer.data.images import Decoder
from trainer.data.pipeline import Batch, Batches
from trainer.data.records import RecordIndex, Replacements
from trainer.data.samplers import SequentialSampler
from trainer.distribute.collectives import current_collectives
from trainer.distribute.strategy import ReplicaBatches
from trainer.distribute.workers import current_workers
from trainer.runtime import shutdown, watchdog


class Embedder:
  """Embeds records on the replicas of the current strategy.

  Attributes:
    global_batch_size: B, over all replicas.

  Args:
    encoder: model from inputs to embeddings.
    index: of the records.
    decoder: decodes records to inputs.
    global_batch_size: rounded up to a multiple of the number of replicas.
    replacements: replaces bad records; None to refuse them.
  """

  def __init__(
    self,
    encoder: tf.keras.Model,
    index: RecordIndex,
    decoder: Decoder,
    *,
    global_batch_size: int,
    replacements: Optional[Replacements] = None,
  ):
    self._strategy = tf.distribute.get_strategy()
    num_replicas = self._strategy.num_replicas_in_sync
    self.global_batch_size = -(-global_batch_size // num_replicas) * num_replicas
    self._encoder = encoder
    self._index = index
    self._decoder = decoder
    self._replacements = replacements
    # Traced once, for all evaluations of a training run.
    self._embed_fn = tf.function(
      lambda batch, exit_requested: self._strategy.run(
        self._embed, (batch, exit_requested)
      ),
      autograph=False,
    )

  def embed(
    self, record_numbers: np.ndarray, *, first_step: int = 0
  ) -> Iterator[np.ndarray]:
    """Embeds records in their order.

    Args:
      record_numbers: [N] int64.
      first_step: the first step.

    Yields:
      [B, D] float32 of each step in order, on every worker; the last step is padded.

    Raises:
      PreemptedError: one of several workers was preempted; raised on all of them.
    """
    size = self.global_batch_size
    sampler = SequentialSampler(record_numbers, records_per_batch=size)
    batches = Batches(
      self._index, sampler, self._decoder, replacements=self._replacements
    )
    num_steps = sampler.num_batches - first_step
    shard = current_workers().shard()
    local = batches.dataset(shard, first_step=first_step, num_steps=num_steps)
    replica_batches = ReplicaBatches(self._strategy, local)
    with batches.reporting_bad_records(first_step, sampler.num_batches - 1):
      for batch in replica_batches.iterator:
        watchdog.beat()
        exit_requested = tf.constant(
          float(shutdown.current_preemption().exit_requested)
        )
        done = self._embed_fn(batch, exit_requested)
        rows, num_to_end = self._strategy.experimental_local_results(done)[0]
        if num_to_end.numpy() > 0:
          raise shutdown.current_preemption().preempted_error()
        yield rows.numpy()

  def _embed(
    self, batch: Batch, exit_requested: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor]:
    # Gather, so that every worker has all rows.
    embeddings = self._encoder(batch.inputs, training=False)
    collectives = current_collectives()
    # `identity` copies the flag to the replica's device, where sums are computed.
    return collectives.gather(embeddings), collectives.sum(tf.identity(exit_requested))
