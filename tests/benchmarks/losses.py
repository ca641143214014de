"""Time and memory of the losses, as ratios measured in one run.

  python -m tests.benchmarks.losses [--only=NAME,...] [--picture=runs/losses.png]

D = 128, K = 4 where nothing else is said, classes in random order, loss and gradient
on the CPU. Beside it, where they are installed: TensorFlow Addons, and PyTorch with
PyTorch Metric Learning. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import sys
from concurrent import futures

import numpy as np
import tensorflow as tf

from tests.benchmarks import measure, references
from trainer import losses
from trainer.losses.loss_terms import Anchors, Candidates

_NUM_DIMENSIONS = 128
_MARGIN = 0.2
_GROWTH = (512, 1024, 2048, 4096, 8192, 16_384)


def _vectors(size):
  vectors = np.random.default_rng(size).normal(size=(size, _NUM_DIMENSIONS))
  return tf.constant(
    vectors / np.linalg.norm(vectors, axis=1, keepdims=True), tf.float32
  )


def _balanced(size, samples_per_class=4):
  labels = np.arange(size, dtype=np.int32) // samples_per_class
  return np.random.default_rng(size).permutation(labels)


def _unbalanced(size):
  """Classes of 1 to 7, 4 on average, in random order."""
  random = np.random.default_rng(size)
  sizes = random.integers(1, 8, size)
  return random.permutation(np.repeat(np.arange(size, dtype=np.int32), sizes)[:size])


def _one_large(size, largest):
  """Classes of 4, and one of many more."""
  labels = _balanced(size)
  labels[:largest] = -1
  return np.random.default_rng(size).permutation(labels)


def _loss_of(loss_fn, labels):
  """The mean loss, as a function of embeddings."""

  def mean(embeddings):
    num = embeddings.shape[0]
    anchors = Anchors(embeddings, tf.constant(labels), tf.ones([num]))
    everything = tf.ones([num], tf.bool)
    terms = loss_fn(
      anchors, Candidates(embeddings, anchors.labels, everything, tf.range(num))
    )
    return terms.total / terms.count, terms.statistics

  return mean


def _with_gradient(mean_fn, embeddings):
  """A call of the mean, its gradient and whatever it returns beside."""

  @tf.function
  def run():
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      loss, more = mean_fn(embeddings)
    return loss, tape.gradient(loss, embeddings), tf.nest.flatten(more)

  return run


def _ours(loss, size, labels=None):
  labels = _balanced(size) if labels is None else labels
  return _with_gradient(_loss_of(loss, labels), _vectors(size))


def _matrix(size):
  return _with_gradient(
    lambda e: (tf.reduce_mean(references.distance_matrix(e)), ()), _vectors(size)
  )


@functools.cache
def _batch_all(**options):
  return losses.BatchAllTripletLoss(margin=_MARGIN, **options)


def cube():
  """batch_all against the formula with all triplets, at B = 512."""
  labels, vectors = _balanced(512), _vectors(512)
  runs = {
    "cube": _with_gradient(
      lambda e: (references.cube(labels, e, _MARGIN), ()), vectors
    ),
    "batch_all": _ours(_batch_all(), 512),
  }
  found = measure.compare(runs, num_rounds=3)
  measure.show("batch_all, B = 512", found, "batch_all")
  time_ratio, memory_ratio = found["cube"].over(found["batch_all"])
  print(
    f"  {time_ratio:.0f} x faster (goal 60), memory 1/{memory_ratio:.0f} (goal 1/5)"
  )


def matrix():
  """Each loss against the distance matrix with its gradient, at B = 4,096.

  The distance matrix is as plain TensorFlow has it, one operation after the other: what
  somebody would write who wants nothing but distances.
  """
  mined = {
    "batch_all": _batch_all(),
    "batch_hard": losses.BatchHardTripletLoss(margin=_MARGIN),
    "hermans_batch_hard": losses.hermans_batch_hard(),
    "semi_hard": losses.SemiHardTripletLoss(margin=_MARGIN),
    "batch_all, exact_euclidean": _batch_all(distance="exact_euclidean"),
    "multi_similarity": losses.MultiSimilarityLoss(),
    "info_nce": losses.InfoNCELoss(temperature=0.1),
    "supervised_contrastive": losses.SupervisedContrastiveLoss(temperature=0.1),
  }
  runs = {"distance matrix": _matrix(4096)}
  runs.update({name: _ours(loss, 4096) for name, loss in mined.items()})
  measure.show(
    "B = 4096 (goal of batch_all: 1.4)", measure.compare(runs, 7), "distance matrix"
  )


def classes():
  """batch_all by the sizes of the classes, at B = 4,096."""
  runs = {
    "4 each": _ours(_batch_all(), 4096),
    "1 to 7": _ours(_batch_all(), 4096, _unbalanced(4096)),
    "16 each": _ours(_batch_all(), 4096, _balanced(4096, 16)),
    "64 each": _ours(_batch_all(), 4096, _balanced(4096, 64)),
    "one of 1,024": _ours(_batch_all(), 4096, _one_large(4096, 1024)),
  }
  measure.show(
    "batch_all, B = 4096, by class size (goal of 1 to 7: 1.5)",
    measure.compare(runs, 5),
    "4 each",
  )


def addons():
  """Semi-hard against TensorFlow Addons, at B = 1,024; takes 20 GB."""
  reference = references.addons_semi_hard(_balanced(1024), _MARGIN)
  if reference is None:
    print("\nTensorFlow Addons is not installed.")
    return
  runs = {
    "addons": _with_gradient(lambda e: (reference(e), ()), _vectors(1024)),
    "semi_hard": _ours(losses.SemiHardTripletLoss(margin=_MARGIN), 1024),
  }
  found = measure.compare(runs, num_rounds=1)
  measure.show("semi_hard, B = 1024", found, "semi_hard")
  time_ratio, memory_ratio = found["addons"].over(found["semi_hard"])
  print(
    f"  {time_ratio:.0f} x faster (goal 100), memory 1/{memory_ratio:.0f} (goal 1/20)"
  )


def pml():
  """batch_all against PyTorch Metric Learning, at B = 512."""
  reference = references.pml_batch_all(_balanced(512), _vectors(512).numpy(), _MARGIN)
  if reference is None:
    print("\nPyTorch Metric Learning is not installed.")
    return
  runs = {"pml": reference, "batch_all": _ours(_batch_all(), 512)}
  measure.show("batch_all, B = 512", measure.compare(runs, 3), "batch_all")


def statistics():
  """What mining statistics add to batch_all, over ten steps."""
  for size in (512, 1024, 4096):
    step = tf.Variable(0)
    mining_statistics, loss = losses.MiningStatistics(), _batch_all()

    def observed(anchors, candidates, step=step, loss=loss, look=mining_statistics):
      output = loss(anchors, candidates)
      found = look.at_step(step.assign_add(1), loss, anchors, candidates)
      return output._replace(statistics={**output.statistics, **found})

    runs = {
      "without": measure.repeated(_ours(_batch_all(), size), 10),
      "with": measure.repeated(_ours(observed, size), 10),
    }
    title = f"mining statistics, B = {size} (goal: 1.10)"
    measure.show(title, measure.compare(runs, 5), "without")


def streaming():
  """batch_all at B = 32,768, against the matrix products of its tiles alone."""
  size = 32_768
  runs = {
    "products": references.tile_products(_vectors(size), rows_per_tile=128),
    "batch_all": _ours(_batch_all(), size),
  }
  found = measure.compare(runs, num_rounds=1)
  measure.show(f"streaming, B = {size} (goals: 3, 1,500 MB)", found, "products")


def _run_of(name, size):
  if name == "batch_all":
    return _ours(_batch_all(), size)
  if name == "distance matrix":
    return _matrix(size)
  labels = _balanced(size)
  return _with_gradient(
    lambda e: (references.cube(labels, e, _MARGIN), ()), _vectors(size)
  )


def _cost_alone(name, size):
  """In a process of its own: one that ran before leaves memory that is used again."""
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=context) as process:
    return process.submit(_cost, name, size).result()


def _cost(name, size):
  return measure.compare({name: _run_of(name, size)}, 3)[name]


def growth(picture):
  """How batch_all grows with B, and a picture of it."""
  largest = {"batch_all": 16_384, "distance matrix": 8192, "cube": 512}
  found = {
    size: {name: _cost_alone(name, size) for name in largest if size <= largest[name]}
    for size in _GROWTH
  }
  seconds = [found[size]["batch_all"].seconds for size in _GROWTH]
  exponent = np.polyfit(np.log(_GROWTH), np.log(seconds), 1)[0]
  first, last = _GROWTH[0], _GROWTH[-1]
  print(f"\nbatch_all grows as B^{exponent:.2f}, {first} to {last} (goal 2.1)")
  for name, cost in found[last].items():
    print(f"  {name}, B = {last}: {cost.megabytes:.0f} MB")
  measure.draw(found, picture)


PARTS = (cube, matrix, classes, addons, pml, statistics, growth, streaming)


def main():
  """Prints all ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  names = [part.__name__ for part in PARTS]
  parser.add_argument("--only", default=",".join(names), help=f"some of {names}")
  parser.add_argument(
    "--picture", default="runs/losses.png", help="time and memory against B"
  )
  arguments = parser.parse_args()
  print(
    f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
    f"Python {sys.version.split()[0]}, TensorFlow {tf.__version__}"
  )
  for part in PARTS:
    if part.__name__ in arguments.only.split(","):
      part(arguments.picture) if part is growth else part()


if __name__ == "__main__":
  main()
