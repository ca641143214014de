"""What replicas cost: python -m tests.benchmarks.distribute.

The loss of one replica, of local anchors against gathered candidates, as its parts
grow; and the gather with its gradient beside a whole step, on virtual replicas.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import platform
import statistics
import sys
import time

import numpy as np
import tensorflow as tf
from absl import app, logging

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import current_collectives
from trainer.distribute.strategy import divide_cpu, mirrored_on_cpu
from trainer.losses import BatchHardTripletLoss
from trainer.losses.loss_terms import Anchors, Candidates
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.training.step import TrainStep

_EMBEDDING_SIZE, _NUM_ROUNDS = 128, 15
_REPLICA_BATCH, _IMAGE_SIZE, _STEPS_PER_CALL = 64, 28, 10


def main(_):
  logging.set_verbosity(logging.ERROR)  # Each size is traced, on purpose.
  tf.get_logger().setLevel("ERROR")
  divide_cpu(4)
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  _print_loss_fit()
  _print_gather()


def _print_loss_fit():
  sizes = [(256, 1024), (256, 4096), (512, 2048), (512, 4096), (1024, 2048)]
  sizes += [(1024, 4096), (2048, 2048), (2048, 4096)]
  times = _seconds_of_sizes(sizes)
  print("\nloss and gradient of one replica, batch_hard, 128 dimensions")
  print(f"{'B_local':>8}{'B_global':>9}{'ms':>9}{'ns a pair':>11}")
  for (local, total), seconds in zip(sizes, times):
    pair_ns = seconds / (local * total) * 1e9
    print(f"{local:8}{total:9}{seconds * 1e3:9.2f}{pair_ns:11.2f}")
  _print_fits(np.array(sizes, float), times)
  tiny = _seconds_of_sizes([(8, 8), (64, 64)])
  print(f"a call of 8 x 8: {tiny[0] * 1e3:.2f} ms, of 64 x 64: {tiny[1] * 1e3:.2f} ms")


def _seconds_of_sizes(sizes):
  """The fastest of some rounds: with the least of what others take of the CPU."""
  functions = [_loss_function(*size) for size in sizes]
  for function in functions:
    function()  # Traces it.
  rounds = [[_seconds(function) for function in functions] for _ in range(_NUM_ROUNDS)]
  return np.min(rounds, axis=0)


def _print_fits(sizes, times):
  """Fits of the relative errors, so that the small sizes count as the large do."""
  pairs = sizes.prod(axis=1)
  columns = np.stack([np.ones_like(pairs), pairs], axis=1)
  fixed, of_pair = _least_squares(columns / times[:, None], np.ones_like(times))
  residuals = times - fixed - of_pair * pairs
  determined = 1 - np.sum(residuals**2) / np.sum((times - times.mean()) ** 2)
  print(
    f"fit: {fixed * 1e3:.2f} ms + {of_pair * 1e9:.3f} ns x B_local x B_global, "
    f"R2 {determined:.3f}, largest error {np.abs(residuals / times).max():.0%}"
  )
  logs = np.column_stack([np.log(sizes), np.ones_like(times)])
  of_local, of_global, _ = _least_squares(logs, np.log(times))
  print(f"fit: time ~ B_local^{of_local:.2f} x B_global^{of_global:.2f}")


def _least_squares(columns, values):
  return np.linalg.lstsq(columns, values, rcond=None)[0]


def _loss_function(num_local, num_global):
  rng = np.random.default_rng(0)
  embeddings = tf.constant(rng.normal(size=(num_global, _EMBEDDING_SIZE)), tf.float32)
  labels = tf.range(num_global) // 4
  loss = BatchHardTripletLoss(margin=0.2)

  @tf.function
  def run(embeddings):
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      anchors = Anchors(
        embeddings[:num_local], labels[:num_local], tf.ones([num_local])
      )
      candidates = Candidates(
        embeddings, labels, tf.fill([num_global], True), tf.range(num_local)
      )
      total = loss(anchors, candidates).total
    return tf.reduce_sum(tape.gradient(total, embeddings))

  return lambda: run(embeddings).numpy()


def _print_gather():
  print(f"\ngather with gradient, replica batch {_REPLICA_BATCH}, beside a step")
  print(f"{'replicas':>9}{'kB in':>8}{'kB moved':>10}{'gather ms':>11}{'step ms':>9}")
  for num_replicas in (2, 4):
    gather, step = _gather_and_step(mirrored_on_cpu(num_replicas))
    gather_s, step_s = _median_seconds(gather), _median_seconds(step)
    own = _REPLICA_BATCH * _EMBEDDING_SIZE * 4 / 1e3
    # Forward a replica receives the others' rows; backward a gradient of all rows is
    # summed, which a ring does by sending it twice, less a part each.
    moved = own * (num_replicas - 1) * 3
    print(
      f"{num_replicas:9}{own:8.0f}{moved:10.0f}{gather_s / _STEPS_PER_CALL * 1e3:11.2f}"
      f"{step_s / _STEPS_PER_CALL * 1e3:9.2f}"
    )


def _gather_and_step(strategy):
  """Functions that do some gathers, and some whole steps."""
  with strategy.scope():
    step = TrainStep(
      encoder=Encoder(
        backbone=ConvNet(filters=(32, 64)), embedding_size=_EMBEDDING_SIZE
      ),
      loss=BatchHardTripletLoss(margin=0.2),
      objective_fn=global_negatives,
      optimizer=tf.keras.optimizers.SGD(1e-3),
    )
    step.create_variables((_IMAGE_SIZE, _IMAGE_SIZE, 1))
  batch = Batch(
    tf.random.uniform([_REPLICA_BATCH, _IMAGE_SIZE, _IMAGE_SIZE, 1]),
    tf.range(_REPLICA_BATCH) // 4,
    tf.ones([_REPLICA_BATCH]),
    tf.range(_REPLICA_BATCH),
  )

  def gather_on_replica():
    rows = tf.random.uniform([_REPLICA_BATCH, _EMBEDDING_SIZE])
    with tf.GradientTape() as tape:
      tape.watch(rows)
      total = tf.reduce_sum(current_collectives().gather(rows) ** 2)
    return tf.reduce_sum(tape.gradient(total, rows))

  def step_on_replica():
    return step(batch, current_collectives())["train/loss"].total

  def repeated(function):
    @tf.function
    def run():
      total = 0.0
      for _ in tf.range(_STEPS_PER_CALL):
        total += strategy.reduce("SUM", strategy.run(function), axis=None)
      return total

    return lambda: run().numpy()

  return repeated(gather_on_replica), repeated(step_on_replica)


def _median_seconds(function):
  function()  # Traces it.
  return statistics.median(_seconds(function) for _ in range(_NUM_ROUNDS))


def _seconds(function):
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


if __name__ == "__main__":
  app.run(main)
