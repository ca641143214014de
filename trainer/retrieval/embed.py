"""Embeddings of records, computed on all replicas.

Shapes: N records, D dimensions, B records of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from trainer import heartbeat
from trainer.data.decode import Decoder
from trainer.data.pipeline import Batches
from trainer.data.records import RecordIndex
from trainer.data.schedule import SequentialSchedule
from trainer.distribute.collectives import current_collectives
from trainer.distribute.workers import current_workers


def whole_batch(num_records: int) -> int:
  """The number of records a step, rounded up to what the replicas divide.

  Args:
    num_records: wanted, over all replicas.
  """
  num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
  return -(-num_records // num_replicas) * num_replicas


def embed(
  encoder: tf.keras.Model,
  index: RecordIndex,
  decoder: Decoder,
  record_numbers: np.ndarray,
  *,
  global_batch_size: int,
  first_step: int = 0,
) -> Iterator[np.ndarray]:
  """Embeds records on the replicas of the current strategy, each its share.

  Args:
    encoder: model from inputs to embeddings.
    index: gives the records.
    decoder: makes inputs of them.
    record_numbers: [N] int64.
    global_batch_size: B, over all replicas; see `whole_batch`.
    first_step: the step to begin with.

  Yields:
    Of each step in order, on every worker: [B, D] float32; the last is padded.
  """
  strategy = tf.distribute.get_strategy()
  schedule = SequentialSchedule(record_numbers, records_per_batch=global_batch_size)
  batches = Batches(index, schedule, decoder)
  num_steps = schedule.num_batches - first_step
  replica_batches = batches.dataset(
    current_workers().shard(), first_step=first_step, num_steps=num_steps
  )

  @tf.function
  def embed_batch(batch):
    return strategy.run(embed_replica, (batch,))

  def embed_replica(batch):
    # Gathered, so that every worker has the rows of all.
    return current_collectives().gather(encoder(batch.inputs, training=False))

  with batches.naming_bad_records(first_step, schedule.num_batches - 1):
    for batch in strategy.distribute_datasets_from_function(lambda _: replica_batches):
      heartbeat.beat()
      yield strategy.experimental_local_results(embed_batch(batch))[0].numpy()
