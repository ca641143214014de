"""Time and memory of the losses, as ratios measured in one run.

  python -m tests.benchmarks.losses [--large]

Balanced batches, K = 4, D = 128, loss and gradient on the CPU. `--large` adds
B = 32,768, which takes minutes.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import time

import numpy as np
import tensorflow as tf

from trainer import losses
from trainer.losses.terms import Anchors, Candidates

_SAMPLES_PER_CLASS = 4
_NUM_DIMENSIONS = 128
_MARGIN = 0.2


def _batch(size, samples_per_class=_SAMPLES_PER_CLASS):
  random = np.random.default_rng(size)
  vectors = random.normal(size=(size, _NUM_DIMENSIONS)).astype(np.float32)
  labels = random.permutation(np.arange(size, dtype=np.int32) // samples_per_class)
  return tf.constant(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)), labels


def _with_gradient(loss_fn, embeddings):
  """A function that runs loss and gradient, traced already."""

  @tf.function
  def run():
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      loss = loss_fn(embeddings)
    return loss, tape.gradient(loss, embeddings)

  run.get_concrete_function()
  return run


def _ours(loss, labels):
  def loss_fn(embeddings):
    num = embeddings.shape[0]
    anchors = Anchors(embeddings, tf.constant(labels), tf.ones([num]))
    everything = tf.ones([num], tf.bool)
    candidates = Candidates(embeddings, anchors.labels, everything, tf.range(num))
    terms = loss(anchors, candidates)
    return terms.total / terms.count

  return loss_fn


def _cube(labels):
  """Batch all from its formula, with a [B, B, B] tensor of triplets."""

  def loss_fn(embeddings):
    distances = losses.pairwise_distances(embeddings)
    same = tf.equal(labels[:, None], labels[None, :])
    positive = tf.logical_and(same, ~tf.eye(len(labels), dtype=tf.bool))
    valid = tf.logical_and(positive[:, :, None], ~same[:, None, :])
    hinge = tf.nn.relu(distances[:, :, None] - distances[:, None, :] + _MARGIN)
    hinge = tf.where(valid, hinge, 0.0)
    return tf.reduce_sum(hinge) / tf.reduce_sum(tf.sign(hinge))

  return loss_fn


def _matrix(embeddings):
  return tf.reduce_mean(losses.pairwise_distances(embeddings))


def _matrix_products(rows_per_tile):
  """The three products of each tile, one forward and two back, and nothing else."""

  def run(embeddings):
    total = tf.zeros([])
    for first in tf.range(0, embeddings.shape[0], rows_per_tile):
      rows = embeddings[first : first + rows_per_tile]
      product = tf.matmul(rows, embeddings, transpose_b=True)
      total += tf.reduce_sum(tf.matmul(product, embeddings))
      total += tf.reduce_sum(tf.matmul(product, rows, transpose_a=True))
    return total

  return tf.function(run)


def _peak_megabytes():
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _measure(runs, num_rounds):
  """Best seconds and peak megabytes above the start of each, taken in turns."""
  seconds = dict.fromkeys(runs, np.inf)
  megabytes = dict.fromkeys(runs, 0.0)
  for _ in range(num_rounds):
    for name, run in runs.items():
      pathlib.Path("/proc/self/clear_refs").write_text("5")
      before = _peak_megabytes()
      start = time.perf_counter()
      tf.nest.map_structure(lambda each: each.numpy(), run())
      seconds[name] = min(seconds[name], time.perf_counter() - start)
      megabytes[name] = max(megabytes[name], _peak_megabytes() - before)
  return seconds, megabytes


def _report(title, runs, floor, num_rounds=5):
  seconds, megabytes = _measure(runs, num_rounds)
  print(f"\n{title}")
  for name in runs:
    ratio = seconds[name] / seconds[floor]
    print(
      f"  {name:34} {1e3 * seconds[name]:10.1f} ms {megabytes[name]:8.0f} MB"
      f" {ratio:8.2f} x {floor}"
    )
  return seconds


def _cube_against_ours():
  embeddings, labels = _batch(512)
  batch_all = losses.BatchAllTripletLoss(margin=_MARGIN)
  _report(
    "batch_all, B = 512",
    {
      "batch_all": _with_gradient(_ours(batch_all, labels), embeddings),
      "cube": _with_gradient(_cube(labels), embeddings),
    },
    "batch_all",
    3,
  )


def _every_loss_against_the_matrix(size):
  embeddings, labels = _batch(size)
  mined = {
    "batch_all": losses.BatchAllTripletLoss(margin=_MARGIN),
    "batch_hard": losses.BatchHardTripletLoss(margin=_MARGIN),
    "semi_hard": losses.SemiHardTripletLoss(margin=_MARGIN),
    "multi_similarity": losses.MultiSimilarityLoss(),
    "info_nce": losses.InfoNCELoss(temperature=0.1),
  }
  runs = {
    name: _with_gradient(_ours(f, labels), embeddings) for name, f in mined.items()
  }
  runs["distance matrix"] = _with_gradient(_matrix, embeddings)
  _report(f"B = {size}", runs, "distance matrix")


def _semi_hard_against_addons():
  try:
    from tensorflow_addons.losses import triplet_semihard_loss
  except ImportError:
    print("\nsemi_hard beside TensorFlow Addons: it is not installed")
    return
  embeddings, labels = _batch(512)
  loss = losses.SemiHardTripletLoss(margin=_MARGIN)

  def addons(embeddings):
    return triplet_semihard_loss(labels, embeddings, margin=_MARGIN)

  _report(
    "semi_hard, B = 512",
    {
      "semi_hard": _with_gradient(_ours(loss, labels), embeddings),
      "addons": _with_gradient(addons, embeddings),
    },
    "semi_hard",
    2,
  )


def _growth():
  sizes = [512, 1024, 2048, 4096, 8192]
  loss = losses.BatchAllTripletLoss(margin=_MARGIN)
  seconds = []
  for size in sizes:
    embeddings, labels = _batch(size)
    run = _with_gradient(_ours(loss, labels), embeddings)
    seconds.append(_measure({"batch_all": run}, 2)[0]["batch_all"])
  exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
  print(f"\nbatch_all grows as B^{exponent:.2f} from {sizes[0]} to {sizes[-1]}")


def _streaming():
  size = 32_768
  embeddings, labels = _batch(size)
  loss = losses.BatchAllTripletLoss(margin=_MARGIN)
  products = _matrix_products(128)
  products.get_concrete_function(embeddings)
  runs = {
    "batch_all": _with_gradient(_ours(loss, labels), embeddings),
    "products": lambda: products(embeddings),
  }
  _report(f"streaming, B = {size}", runs, "products", 1)


def main():
  """Prints all ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--large", action="store_true", help="B = 32,768 as well")
  arguments = parser.parse_args()
  print(f"{platform.processor() or platform.machine()}, TensorFlow {tf.__version__}")
  _cube_against_ours()
  _semi_hard_against_addons()
  _every_loss_against_the_matrix(1024)
  _every_loss_against_the_matrix(4096)
  _growth()
  if arguments.large:
    _streaming()


if __name__ == "__main__":
  main()
