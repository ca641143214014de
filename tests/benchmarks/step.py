"""What the trainer adds to a step: python -m tests.benchmarks.step [--image_size=8]

The inner loop, with sampler, reading, decoding and statistics, against the same
replica step called bare, again and again on one batch, in a loop of the same kind.
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

from trainer.data import ingestion
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item, encode_png
from trainer.distribute.collectives import current_collectives
from trainer.distribute.strategy import ReplicaBatches, make_strategy
from trainer.losses import BatchAllTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.run import Hardware
from trainer.training.loop import HostFlags, InnerLoop
from trainer.training.step import TrainStep

_IMAGE_SIZE = flags.DEFINE_integer("image_size", 28, "Height and width, pixels.")
_NUM_REPLICAS = flags.DEFINE_integer("num_replicas", 1, "Virtual replicas.")
_NUM_STEPS, _NUM_ROUNDS = 30, 5


def main(_):
  strategy = make_strategy(Hardware("auto", _NUM_REPLICAS.value))
  with tempfile.TemporaryDirectory() as folder, strategy.scope():
    ingestion.write_records(_items(), folder, records_per_shard=1000, fingerprint={})
    whole, bare = _loops(strategy, RecordIndex.open(folder))
    for loop in (whole, bare):
      loop(2)  # Traces it.
    pairs = [(_seconds(whole), _seconds(bare)) for _ in range(_NUM_ROUNDS)]
  whole_s, bare_s = (statistics.median(column) for column in zip(*pairs))
  ratio = statistics.median(a / b for a, b in pairs)
  print(f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}")
  print(f"{_NUM_REPLICAS.value} replicas, {_IMAGE_SIZE.value} pixels")
  print(f"trainer's step {whole_s / _NUM_STEPS * 1e3:.2f} ms")
  print(f"bare step      {bare_s / _NUM_STEPS * 1e3:.2f} ms")
  print(f"ratio {ratio:.3f} (median of pairs; goal: at most 1.10)")


def _items():
  rng = np.random.default_rng(0)
  for number in range(2000):
    image = rng.integers(0, 256, (_IMAGE_SIZE.value, _IMAGE_SIZE.value))
    yield Item(str(number), str(number % 50), encode_png(image.astype(np.uint8)))


def _loops(strategy, index):
  step = TrainStep(
    encoder=Encoder(backbone=ConvNet(filters=(32, 64)), embedding_size=64),
    loss=BatchAllTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.Adam(1e-3),
  )
  decoder = ImageDecoder(height=_IMAGE_SIZE.value, width=_IMAGE_SIZE.value, channels=1)
  step.create_variables(decoder.shape)
  sampler = PKSampler(index, classes_per_batch=8, samples_per_class=16, seed=0)
  num_replicas = strategy.num_replicas_in_sync
  shard = Shard(0, num_replicas, num_replicas)
  dataset = Batches(index, sampler, decoder).dataset(shard)
  batches = ReplicaBatches(strategy, dataset)
  one_batch = next(batches.iterator)

  @tf.function
  def bare(num_steps):
    for _ in tf.range(num_steps):
      strategy.run(lambda batch: step(batch, current_collectives()), (one_batch,))

  inner = InnerLoop(
    step=step,
    strategy=strategy,
    batches=batches,
    zero_statistics=step.zero_statistics(dataset.element_spec),
    host_flags_fn=lambda: HostFlags(False, False),
  )
  return inner.run, lambda num_steps: bare(tf.constant(num_steps))


def _seconds(loop):
  start = time.perf_counter()
  loop(_NUM_STEPS)
  return time.perf_counter() - start


if __name__ == "__main__":
  app.run(main)
