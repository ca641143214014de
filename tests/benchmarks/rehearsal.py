"""What it costs to make variables once more: python -m tests.benchmarks.rehearsal.

Each worker of several does so at the start, to tell the others whether it can.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import platform
import statistics
import sys
import time

import tensorflow as tf
from absl import app

from trainer.models.backbones import ConvNet, KerasApplication
from trainer.models.encoder import Encoder

_SHAPE, _NUM_ROUNDS = (64, 64, 3), 3
_BACKBONES = {
  "ConvNet": lambda: ConvNet(filters=(32, 64)),
  "MobileNet": lambda: KerasApplication(name="MobileNet"),
  "ResNet50": lambda: KerasApplication(name="ResNet50"),
}


def main(_):
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  print(f"{'backbone':<12}{'MB':>7}{'CPU s':>7}")
  for name, make_backbone in _BACKBONES.items():
    _make(make_backbone)  # The first of a process loads what all need.
    rounds = [_make(make_backbone) for _ in range(_NUM_ROUNDS)]
    num_bytes, seconds = (statistics.median(column) for column in zip(*rounds))
    print(f"{name:<12}{num_bytes / 1e6:7.1f}{seconds:7.2f}")


def _make(make_backbone):
  """Bytes of the variables of an encoder and of Adam, and seconds of CPU they took."""
  start = time.process_time()
  encoder = Encoder(backbone=make_backbone(), embedding_size=64, pooling="average")
  encoder.create_variables(_SHAPE)
  optimizer = tf.keras.optimizers.Adam()
  optimizer.build(encoder.trainable_variables)
  seconds = time.process_time() - start
  variables = [*encoder.variables, *optimizer.variables]
  return sum(v.shape.num_elements() * v.dtype.size for v in variables), seconds


if __name__ == "__main__":
  app.run(main)
