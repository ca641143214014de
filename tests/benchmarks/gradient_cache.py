"""Memory and time by micro-batches: python -m tests.benchmarks.gradient_cache.

Each number of micro-batches is measured in a process of its own, for its peak memory.
Time is that of a step over the plain one, alternating in one process.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
from absl import app, flags

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

_MEASURED = flags.DEFINE_integer("num_micro_batches", 0, "Measure the memory of this.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Examples.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 32, "Height and width, pixels.")
_NUMBERS = (1, 2, 4, 8, 16)
_NUM_ROUNDS = 5


def main(_):
  if _MEASURED.value:
    print(_peak_bytes(_MEASURED.value))
    return
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  print(f"batch {_BATCH_SIZE.value}, {_IMAGE_SIZE.value} pixels, ConvNet (64, 128)")
  memory = {number: _memory_of_process(number) for number in _NUMBERS}
  ratios = _time_ratios()
  print(f"{'micro-batches':>13}{'step memory':>13}{'time / plain':>14}")
  for number in _NUMBERS:
    print(f"{number:13}{memory[number] / 1e6:10.0f} MB{ratios[number]:14.2f}")
  print("goal: at most 1.50 x the time")


def _step_fn(num_micro_batches):
  tf.keras.utils.set_random_seed(0)
  size = _IMAGE_SIZE.value
  step = TrainStep(
    encoder=Encoder(
      backbone=ConvNet(filters=(64, 128)), embedding_size=64, pooling="average"
    ),
    loss=SupervisedContrastiveLoss(temperature=0.1),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(1e-3),
    options=StepOptions(num_micro_batches=num_micro_batches),
  )
  step.create_variables((size, size, 3))
  labels = np.repeat(np.arange(_BATCH_SIZE.value // 4, dtype=np.int32), 4)
  rng = np.random.default_rng(0)
  images = rng.random((len(labels), size, size, 3), dtype=np.float32)
  weights, numbers = tf.ones([len(labels)]), tf.range(len(labels))
  batch = Batch(tf.constant(images), tf.constant(labels), weights, numbers)
  update = tf.function(lambda: step(batch, OneReplica())["train/loss"].total)
  return lambda: update().numpy()


def _peak_bytes(num_micro_batches):
  """What a step takes at its peak beyond what is there before it."""
  step = _step_fn(num_micro_batches)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for _ in range(2):
    step()
  return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _memory_of_process(number):
  command = [sys.executable, "-m", "tests.benchmarks.gradient_cache"]
  command += [f"--num_micro_batches={number}", f"--batch_size={_BATCH_SIZE.value}"]
  command += [f"--image_size={_IMAGE_SIZE.value}"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return int(done.stdout.split()[-1])


def _time_ratios():
  steps = {number: _step_fn(number) for number in _NUMBERS}
  for step in steps.values():
    step()
  rounds = []
  for _ in range(_NUM_ROUNDS):
    seconds = {number: _seconds(step) for number, step in steps.items()}
    rounds.append({number: taken / seconds[1] for number, taken in seconds.items()})
  return {number: statistics.median(r[number] for r in rounds) for number in _NUMBERS}


def _seconds(step):
  start = time.perf_counter()
  step()
  return time.perf_counter() - start


if __name__ == "__main__":
  app.run(main)
