"""What a memory bank costs, against the products with its entries alone.

  python -m tests.benchmarks.cross_batch_memory [--only=NAME,...] [--num_rounds=N]

256 anchors, D = 128, a bank of 65,536 in 16,384 classes, on the CPU: the time of a loss
and its gradient with the bank, less the same without, over the time of the two products
that there is no way around: the inner products with the entries, and the slopes with
the entries, which is the gradient to the anchors. The first row is no loss, but the
least that one can cost. Nothing else should run meanwhile; the same of the processor's
time, of all cores together, depends less on what does.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time

import numpy as np
import tensorflow as tf

from trainer import losses
from trainer.distribute.collectives import OneReplica
from trainer.losses.cross_batch_memory import (
  CrossBatchMemory,
  Entries,
)
from trainer.losses.distances import cosine_similarity
from trainer.losses.loss_terms import Anchors, Candidates
from trainer.losses.objectives import MiningBatch
from trainer.losses.tiled_loss import AnchorTerms, TiledPairLoss

_BATCH, _BANK, _NUM_DIMENSIONS = 256, 65_536, 128
_NUM_CLASSES, _SAMPLES_PER_CLASS = 16_384, 4
_GOAL = 1.5


class _SumAlone(TiledPairLoss):
  """No loss, but the least that one can cost: a sum of each anchor's similarities."""

  def __init__(self):
    super().__init__(comparison=cosine_similarity, reduction="mean_anchors")

  def anchor_terms(self, compared, pairs, parameters):
    total = tf.reduce_sum(compared, 1)
    return AnchorTerms(total, tf.ones_like(total), tf.ones_like(total))


LOSSES = {
  "a_sum_alone": _SumAlone,
  "contrastive": lambda: losses.ContrastiveLoss(margin=0.5),
  "multi_similarity": losses.MultiSimilarityLoss,
  "info_nce": lambda: losses.InfoNCELoss(temperature=0.1),
  "supervised_contrastive": lambda: losses.SupervisedContrastiveLoss(temperature=0.1),
  "batch_all": lambda: losses.BatchAllTripletLoss(margin=0.2),
  "batch_hard": lambda: losses.BatchHardTripletLoss(margin=0.2),
}


def _vectors(size):
  vectors = np.random.default_rng(size).normal(size=(size, _NUM_DIMENSIONS))
  return tf.constant(
    vectors / np.linalg.norm(vectors, axis=1, keepdims=True), tf.float32
  )


def _products():
  """The products with the entries of the bank, and nothing between them."""
  anchors, entries = _vectors(_BATCH), tf.Variable(_vectors(_BANK))

  @tf.function
  def run():
    products = tf.matmul(anchors, entries, transpose_b=True)
    return tf.matmul(products, entries)

  return run


def _step(loss, bank):
  """A step's loss, its gradient, and what is kept of the batch."""
  embeddings = _vectors(_BATCH)
  labels = tf.repeat(tf.range(_BATCH // _SAMPLES_PER_CLASS), _SAMPLES_PER_CLASS)
  anchors = Anchors(embeddings, labels, tf.ones([_BATCH]))
  candidates = Candidates(
    embeddings, labels, tf.ones([_BATCH], tf.bool), tf.range(_BATCH)
  )

  @tf.function
  def run():
    statistics = {}
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      pairs = MiningBatch(
        anchors._replace(embeddings=embeddings),
        candidates._replace(embeddings=embeddings),
        is_global=True,
      )
      compared = pairs.candidates
      if bank:
        # Of records that are in the bank too, so that copies are found.
        compared, new_entries, statistics = bank.extend(
          pairs, tf.range(_BATCH), tf.constant(1000), OneReplica()
        )
      terms = loss(pairs.anchors, compared)
    gradient = tape.gradient(terms.total, embeddings)
    if bank:
      bank.add(new_entries)
    return terms.total, gradient, tf.nest.flatten({**terms.statistics, **statistics})

  return run


def _full_bank():
  bank = CrossBatchMemory(size=_BANK, warm_up_steps=0)
  bank.create_variables(_NUM_DIMENSIONS)
  rng = np.random.default_rng(0)
  labels = tf.constant(rng.integers(0, _NUM_CLASSES, _BANK), tf.int32)
  numbers = tf.constant(rng.integers(0, 10 * _BANK, _BANK), tf.int32)
  bank.add(Entries(_vectors(_BANK), labels, numbers, tf.zeros([_BANK], tf.int32)))
  return bank


def _print_cost(name, num_rounds):
  loss = LOSSES[name]()
  runs = [_products(), _step(loss, None), _step(loss, _full_bank())]
  least = np.full([len(runs), 2], np.inf)
  for _ in range(num_rounds + 1):  # The first compiles.
    least = np.minimum(least, [_seconds(run) for run in runs])
  products, without, with_bank = least
  time_ratio, processor_ratio = (with_bank - without) / products
  milliseconds = "".join(f"{1e3 * each:9.1f} ms" for each in least[:, 0])
  print(
    f"  {name:24}{milliseconds}{time_ratio:9.2f}{processor_ratio:12.2f}", flush=True
  )


def _seconds(run):
  """Time and processor time of a call."""
  start, processor_start = time.perf_counter(), time.process_time()
  tf.nest.map_structure(lambda each: each.numpy(), run())
  return time.perf_counter() - start, time.process_time() - processor_start


def main():
  """Prints the ratio of each loss."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default=",".join(LOSSES), help=f"some of {[*LOSSES]}")
  parser.add_argument("--num_rounds", type=int, default=7)
  arguments = parser.parse_args()
  print(
    f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
    f"Python {sys.version.split()[0]}, TensorFlow {tf.__version__}\n"
    f"  {'':24}{'products':>12}{'without':>12}{'with':>12}"
    f"{f'(≤ {_GOAL})':>9}{'processor':>12}"
  )
  for name in arguments.only.split(","):
    _print_cost(name, arguments.num_rounds)


if __name__ == "__main__":
  main()
