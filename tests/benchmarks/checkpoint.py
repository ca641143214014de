"""What saving costs: python -m tests.benchmarks.checkpoint [--megabytes=40].

Blocks of 100 steps, in turns: without saving, with a save at the end that is written
beside the next block, and with one that is waited for.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf
from absl import app, flags

from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training.checkpoint import Checkpoints, TrainingState

_MEGABYTES = flags.DEFINE_integer("megabytes", 40, "Size of a checkpoint.")
_BATCH = flags.DEFINE_integer("batch", 64, "Examples a step.")
_NUM_STEPS, _NUM_ROUNDS, _NUM_INPUTS = 100, 5, 256


def main(_):
  # Adam keeps three numbers a weight.
  units = _MEGABYTES.value * 1_000_000 // (3 * 4 * _NUM_INPUTS)
  encoder = Encoder(backbone=Perceptron(hidden_units=(units,)), embedding_size=8)
  encoder.create_variables((_NUM_INPUTS,))
  optimizer = tf.keras.optimizers.Adam(1e-3)
  optimizer.build(encoder.trainable_variables)
  block = _block(encoder, optimizer)
  block()
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(
      model_dir=folder, encoder=encoder, training=TrainingState(optimizer)
    )
    rounds = [_round(block, checkpoints, number) for number in range(_NUM_ROUNDS)]
  plain, copy = (statistics.median(each) for each in [*zip(*rounds)][:2])
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  print(
    f"a checkpoint of {checkpoints.num_bytes / 1e6:.0f} MB every {_NUM_STEPS} steps"
  )
  print(f"step without saving {plain / _NUM_STEPS * 1e3:.2f} ms")
  print(
    f"copy to the host {copy * 1e3:.1f} ms: {share([(c, p) for p, c, *_ in rounds])}"
  )
  print(f"beside the training: {share([(b - p, p) for p, _, b, _ in rounds])} in all")
  print(f"if it were waited for: {share([(w - p, p) for p, *_, w in rounds])}")


def share(pairs) -> str:
  """Median of ratios, as a share of the step time."""
  return f"{statistics.median(a / b for a, b in pairs):.1%} of the step time"


def _block(encoder, optimizer):
  inputs = tf.constant(
    np.random.default_rng(0).random((_BATCH.value, _NUM_INPUTS)), tf.float32
  )

  @tf.function
  def steps():
    for _ in tf.range(_NUM_STEPS):
      with tf.GradientTape() as tape:
        loss = tf.reduce_sum(encoder(inputs)[:, 0])
      gradients = tape.gradient(loss, encoder.trainable_variables)
      optimizer.apply_gradients(zip(gradients, encoder.trainable_variables))

  return lambda: (steps(), optimizer.iterations.numpy())


def _round(block, checkpoints, number):
  """Seconds of a block alone, of the copy, of a block beside a write, and of both."""
  plain = _seconds(block)
  copy = _seconds(lambda: checkpoints.save(2 * number + 1))
  beside = copy + _seconds(block)
  checkpoints.wait()
  waited = _seconds(lambda: (checkpoints.save(2 * number + 2), checkpoints.wait()))
  return plain, copy, beside, plain + waited


def _seconds(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


if __name__ == "__main__":
  app.run(main)
