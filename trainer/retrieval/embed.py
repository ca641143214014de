"""Embeddings of records, computed on all replicas.

Shapes: N records, D dimensions.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.data.dataset import Dataset
from trainer.data.pipeline import Batches
from trainer.data.schedule import SequentialSchedule
from trainer.distribute.collectives import current_collectives
from trainer.distribute.workers import current_workers


def embed(
  encoder: tf.keras.Model,
  dataset: Dataset,
  record_numbers: np.ndarray,
  *,
  strategy: tf.distribute.Strategy,
  global_batch_size: int,
) -> np.ndarray:
  """Embeds records.

  Args:
    encoder: model from inputs to embeddings.
    dataset: where the records are, and how they are decoded.
    record_numbers: [N] int64.
    strategy: the replicas that share the work.
    global_batch_size: records a step, over all replicas; the last step is padded.

  Returns:
    [N, D] float32, in the order of the record numbers.
  """
  schedule = SequentialSchedule(record_numbers, records_per_batch=global_batch_size)
  batches = Batches(dataset.index, schedule, dataset.decoder)
  replica_batches = batches.dataset(
    current_workers().shard(), num_steps=schedule.num_batches
  )

  @tf.function
  def embed_batch(batch):
    return strategy.run(embed_replica, (batch,))

  def embed_replica(batch):
    # Gathered, so that every worker has the rows of all.
    return current_collectives().gather(encoder(batch.inputs, training=False))

  rows: list[np.ndarray] = []
  with batches.naming_bad_records(0, schedule.num_batches - 1):
    for batch in strategy.distribute_datasets_from_function(lambda _: replica_batches):
      rows.append(strategy.experimental_local_results(embed_batch(batch))[0].numpy())
  return np.concatenate(rows)[: len(record_numbers)]
