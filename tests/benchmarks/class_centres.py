"""Time and memory of class centres, against the three matrix products of a step.

  python -m tests.benchmarks.class_centres [--only=rates,growth,large,peers]

ArcFace with 256 examples of 128 dimensions on the CPU. A step reads the rows, computes
loss and gradients and updates rows and momentum; the products are those of the logits
and of the gradients to embeddings and rows. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

from tests.benchmarks import measure, references
from trainer.distribute.collectives import OneReplica
from trainer.losses.centre_losses import ArcFaceLoss
from trainer.losses.class_centres import ClassCentres, RowUpdate, TrainingClasses
from trainer.losses.loss_terms import Anchors
from trainer.losses.objectives import global_negatives
from trainer.training import centre_shards
from trainer.training.row_optimizers import RowSGD

_BATCH, _NUM_DIMENSIONS, _SCALE = 256, 128, 64.0
_MILLION = 1_000_000


def _table(num_classes, rate, num_dimensions=_NUM_DIMENSIONS):
  centres = ClassCentres(optimizer=RowSGD(learning_rate=0.1), sampling_rate=rate)
  labels = np.arange(num_classes, dtype=np.int32)
  centres.create_variables(num_dimensions, TrainingClasses(labels))
  return centres


def _batch(num_classes, num_dimensions=_NUM_DIMENSIONS):
  embeddings = tf.random.stateless_normal([_BATCH, num_dimensions], (0, 1))
  labels = np.random.default_rng(0).integers(0, num_classes, _BATCH).astype(np.int32)
  return embeddings, tf.constant(labels)


def _step(centres, num_dimensions=_NUM_DIMENSIONS):
  """A step of loss, gradients and update."""
  loss, alone = ArcFaceLoss(centres=centres, scale=_SCALE), OneReplica()
  embeddings, labels = _batch(centres.num_classes, num_dimensions)
  steps = tf.Variable(0)

  @tf.function(autograph=False)
  def run():
    step = steps.assign_add(1)
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      anchors = Anchors(embeddings, labels, tf.ones([_BATCH]))
      pairs = global_negatives(anchors, alone)
      rows = centres.read(labels, step, alone)
      tape.watch(rows.vectors)
      value = loss.replica_loss(pairs, [rows], alone).value
    to_embeddings, to_rows = tape.gradient(value, [embeddings, rows.vectors])
    centres.update(RowUpdate(rows.indices, to_rows, rows.own_rows), step)
    return value, to_embeddings

  return run


def _products(num_classes):
  """The three products, whole."""
  embeddings, _ = _batch(num_classes)
  rows = tf.random.stateless_normal([num_classes, _NUM_DIMENSIONS], (0, 2))

  @tf.function(autograph=False)
  def run():
    logits = tf.matmul(embeddings, rows, transpose_b=True)
    to_embeddings = tf.matmul(logits, rows)
    to_rows = tf.matmul(logits, embeddings, transpose_a=True)
    return to_embeddings, to_rows

  return run


def rates():
  """A million classes: all of them, and a tenth."""
  runs = {
    "products": _products(_MILLION),
    "rate 1.0": _step(_table(_MILLION, 1.0)),
    "rate 0.1": _step(_table(_MILLION, 0.1)),
  }
  costs = measure.compare(runs, 5)
  measure.show("1,000,000 classes (goal: 1.30 x products)", costs, "products")
  share = costs["rate 0.1"].seconds / costs["rate 1.0"].seconds
  print(f"  rate 0.1 takes {share:.2f} of the time of rate 1.0 (goal: 0.20)")
  print(
    f"  and {costs['rate 0.1'].megabytes:.0f} MB above rows and moments (goal: 300)"
  )


def growth():
  """Equal numbers of sampled rows, of tables of two sizes."""
  runs = {
    "C = 100,000": _step(_table(100_000, 0.2)),
    "C = 1,000,000": _step(_table(_MILLION, 0.02)),
  }
  costs = measure.compare(runs, 10)
  measure.show("20,000 sampled rows (goal: 1.20)", costs, "C = 100,000")


def large():
  """Ten million classes of 64 dimensions: trained, saved and restored."""
  start = time.perf_counter()
  centres = _table(10 * _MILLION, 0.1, 64)
  print(f"\n10,000,000 classes x 64: made in {time.perf_counter() - start:.1f} s")
  run = _step(centres, 64)
  run()
  start = time.perf_counter()
  for _ in range(3):
    run()[0].numpy()
  seconds = (time.perf_counter() - start) / 3
  print(f"  step {seconds:.2f} s; peak {measure.peak_megabytes():,.0f} MB")
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    rows = centre_shards.copy_rows(1, [centres], is_chief=True)
    copied = time.perf_counter() - start
    centre_shards.write_rows(folder, rows, "save")
    written = time.perf_counter() - start
    names = centre_shards.shard_names(1, [centres])
    files = centre_shards.collect_facts(folder, names, "save")
    start = time.perf_counter()
    centre_shards.restore_rows(folder, files, [centres])
    restored = time.perf_counter() - start
  print(
    f"  copied to the host in {copied:.1f} s, written in {written:.1f} s in all, "
    f"restored in {restored:.1f} s; {centres.num_bytes / 1e9:.1f} GB"
  )
  print(
    f"  peak {measure.peak_megabytes():,.0f} MB; a save stops the training for "
    f"{copied / seconds:.1f} steps, and writes during the next "
    f"{(written - copied) / seconds:.1f}"
  )


def peers():
  """Beside a dense head in Keras and PyTorch Metric Learning, at 100,000 classes."""
  num_classes = 100_000
  embeddings, labels = _batch(num_classes)
  head = tf.Variable(tf.random.stateless_normal([_NUM_DIMENSIONS, num_classes], (0, 3)))
  optimizer = tf.keras.optimizers.SGD(0.1, momentum=0.9)
  optimizer.build([head])

  @tf.function(autograph=False)
  def dense():
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      unit = tf.math.l2_normalize(embeddings, 1)
      cosines = tf.matmul(unit, tf.math.l2_normalize(head, 0))
      own = tf.one_hot(labels, num_classes)
      moved = tf.cos(tf.acos(tf.clip_by_value(cosines, -1 + 1e-7, 1 - 1e-7)) + 0.5)
      logits = _SCALE * tf.where(own > 0, moved, cosines)
      value = tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
      )
    to_embeddings, to_head = tape.gradient(value, [embeddings, head])
    optimizer.apply_gradients([(to_head, head)])
    return value, to_embeddings

  runs = {
    "dense head": dense,
    "rate 1.0": _step(_table(num_classes, 1.0)),
    "rate 0.1": _step(_table(num_classes, 0.1)),
  }
  reference = references.pml_arc_face(
    labels.numpy().astype(np.int64), embeddings.numpy(), num_classes, _SCALE
  )
  if reference is None:
    print("\nPyTorch Metric Learning is not installed.")
  else:
    runs["PyTorch ML"] = reference
  measure.show("100,000 classes", measure.compare(runs, 5), "dense head")


BENCHMARKS = {"rates": rates, "growth": growth, "large": large, "peers": peers}


def main(arguments):
  """Prints the chosen benchmarks."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--only", default=",".join(BENCHMARKS))
  options = parser.parse_args(arguments)
  print(f"{platform.processor() or platform.machine()}, TensorFlow {tf.__version__}")
  for name in options.only.split(","):
    BENCHMARKS[name]()


if __name__ == "__main__":
  main(sys.argv[1:])
