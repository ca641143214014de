"""Batches for tests of losses, and their evaluation."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.losses.loss_terms import Anchors, Candidates

# Few sizes: each size compiles a loss.
LABELS = {
  "unbalanced": [3, 1, 3, 3, 1, 0, 7, 0, 3, 1, 3, 0],
  "balanced": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
  "extreme": [2**31 - 1, -(2**31), 2**31 - 1, 2**24, 2**24 + 1, 2**24, *range(-3, 3)],
  "one_class": [4] * 12,
  "all_distinct": [0, 1, 2, 3, 4],
  "single": [5],
}


def random_batch(name, num_dimensions=5):
  """Returns embeddings of unequal norms, [B, D] float32, and labels [B] int32."""
  labels = np.array(LABELS[name], np.int32)
  random = np.random.default_rng(len(name))
  embeddings = random.normal(size=(len(labels), num_dimensions))
  return embeddings.astype(np.float32), labels


def arguments(embeddings, labels, weights=None, rows=None, **given):
  """Returns anchors and candidates of one device; `rows` selects anchors.

  `is_relevant` and `is_compared` are [B, B], of all anchors; None for none.
  """
  embeddings = tf.convert_to_tensor(embeddings)
  labels = tf.convert_to_tensor(labels)
  weights = np.ones(len(labels), np.float32) if weights is None else weights
  rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
  anchors = Anchors(
    tf.gather(embeddings, rows), tf.gather(labels, rows), tf.constant(weights[rows])
  )
  candidates = Candidates(
    embeddings, labels, tf.constant(weights > 0), tf.constant(rows, tf.int32)
  )
  given = {
    name: tf.constant(pairs[rows]) for name, pairs in given.items() if pairs is not None
  }
  return anchors, candidates._replace(**given)


def evaluate(loss, embeddings, labels, *options, **named_options):
  """Returns total, count and gradient to the embeddings, as float32 arrays."""
  embeddings = tf.convert_to_tensor(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    terms = loss(*arguments(embeddings, labels, *options, **named_options))
  gradient = tape.gradient(
    terms.total, embeddings, unconnected_gradients=tf.UnconnectedGradients.ZERO
  )
  gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
  return terms.total.numpy(), terms.count.numpy(), gradient.numpy()
