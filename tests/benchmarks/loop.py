"""What the loop on the devices saves: python -m tests.benchmarks.loop.

A hundred steps in one call of the inner loop, against a hundred calls of one step each
with its statistics brought to the host, of a toy encoder; pairs in one process.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time

import numpy as np
import tensorflow as tf
from absl import app

from trainer.data.pipeline import Batch
from trainer.distribute.strategy import ReplicaBatches, divide_cpu, mirrored_on_cpu
from trainer.losses import BatchHardTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training.loop import HostFlags, InnerLoop
from trainer.training.step import TrainStep

_NUM_STEPS, _NUM_ROUNDS, _REPLICA_BATCH = 100, 7, 16


def main(_):
  divide_cpu(2)
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  for num_replicas in (1, 2):
    loop = _loop(mirrored_on_cpu(num_replicas))
    pairs = [_pair(loop) for _ in range(_NUM_ROUNDS)]
    inside, outside = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(one / other for one, other in pairs)
    print(
      f"{num_replicas} replicas: loop {inside / _NUM_STEPS * 1e3:.2f} ms a step, calls "
      f"{outside / _NUM_STEPS * 1e3:.2f} ms a step, ratio {ratio:.2f} (goal: 0.60)"
    )


def _loop(strategy):
  with strategy.scope():
    step = TrainStep(
      encoder=Encoder(backbone=Perceptron(hidden_units=(16,)), embedding_size=8),
      loss=BatchHardTripletLoss(margin=0.2),
      objective_fn=global_negatives,
      optimizer=tf.keras.optimizers.SGD(1e-3),
    )
    step.create_variables((8,))
  rng = np.random.default_rng(0)
  batch = Batch(
    tf.constant(rng.random((_REPLICA_BATCH, 8)), tf.float32),
    tf.range(_REPLICA_BATCH) // 4,
    tf.ones([_REPLICA_BATCH]),
    tf.range(_REPLICA_BATCH),
  )
  dataset = tf.data.Dataset.from_tensors(batch).repeat()
  loop = InnerLoop(
    step=step,
    strategy=strategy,
    batches=ReplicaBatches(strategy, dataset),
    zero_statistics=step.zero_statistics(dataset.element_spec),
    host_flags_fn=lambda: HostFlags(False, False),
  )
  loop.run(2)  # Traces it.
  return loop


def _pair(loop):
  start = time.perf_counter()
  loop.run(_NUM_STEPS)
  middle = time.perf_counter()
  for _ in range(_NUM_STEPS):
    loop.run(1)
  return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
  app.run(main)
