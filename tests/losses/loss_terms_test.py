from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer.errors import UserError
from trainer.losses.loss_terms import (
  check_batch,
  check_labels,
  lists_of_pairs,
  pair_masks,
  positive_lists,
)


def _columns(lists):
  """Returns the positives of each anchor, as sets."""
  rows = [set() for _ in lists.sizes]
  for k in range(int(max(lists.sizes))):
    places, is_positive = lists.places(tf.constant(k))
    for (row, column), counts in zip(places.numpy(), is_positive.numpy()):
      if counts:
        assert column not in rows[row]
        rows[row].add(column)
  return rows


def _expected(anchors, candidates):
  is_positive = pair_masks(anchors, candidates).is_positive.numpy()
  return [set(np.flatnonzero(row)) for row in is_positive]


@pytest.mark.parametrize("batch", batches.LABELS)
def test_lists_hold_the_positives_of_each_anchor_once(batch):
  arguments = batches.arguments(*batches.random_batch(batch))
  assert _columns(positive_lists(*arguments)) == _expected(*arguments)


def test_padding_is_in_no_list():
  embeddings, labels = batches.random_batch("unbalanced")
  weights = np.float32([1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1])
  anchors, candidates = batches.arguments(embeddings, labels, weights)
  got = _columns(positive_lists(anchors, candidates))
  expected = _expected(anchors, candidates)
  assert [got[row] for row in np.flatnonzero(weights)] == [
    expected[row] for row in np.flatnonzero(weights)
  ]


def test_each_subset_of_anchors_has_its_own_lists():
  embeddings, labels = batches.random_batch("unbalanced")
  arguments = batches.arguments(embeddings, labels, rows=[4, 9, 2])
  assert _columns(positive_lists(*arguments)) == _expected(*arguments)


def test_lists_support_several_labels_per_example():
  labels = np.random.default_rng(0).random((9, 4)) < 0.4
  arguments = batches.arguments(np.zeros((9, 2), np.float32), labels)
  assert positive_lists(*arguments) is None
  lists = lists_of_pairs(pair_masks(*arguments).is_positive)
  assert _columns(lists) == _expected(*arguments)


def test_rows_of_lists_are_those_of_the_anchors():
  arguments = batches.arguments(*batches.random_batch("unbalanced"))
  rows = [7, 0, 3]
  lists = positive_lists(*arguments).rows(tf.constant(rows))
  expected = _expected(*arguments)
  assert _columns(lists) == [expected[row] for row in rows]


_EMBEDDINGS = np.zeros((3, 2), np.float32)


def test_anchor_itself_and_padding_are_neither_positive_nor_negative():
  weights = np.array([1, 1, 0], np.float32)
  pairs = pair_masks(*batches.arguments(_EMBEDDINGS, np.array([1, 1, 1]), weights))
  expected = [[False, True, False], [True, False, False], [True, True, False]]
  np.testing.assert_array_equal(pairs.is_positive, expected)
  assert not pairs.is_negative.numpy().any()


def test_examples_that_share_a_label_are_positives():
  labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
  pairs = pair_masks(*batches.arguments(_EMBEDDINGS, labels))
  expected = [[False, True, False], [True, False, False], [False, False, False]]
  np.testing.assert_array_equal(pairs.is_positive, expected)
  np.testing.assert_array_equal(
    pairs.is_negative, ~np.array(expected) & ~np.eye(3, dtype=bool)
  )


def test_given_relevance_overrides_labels():
  anchors, candidates = batches.arguments(_EMBEDDINGS, np.array([1, 1, 2]))
  given = np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
  pairs = pair_masks(anchors, candidates._replace(is_relevant=tf.constant(given)))
  np.testing.assert_array_equal(pairs.is_positive, given)
  assert pairs.is_negative.numpy()[0, 1]


def test_integer_labels_beyond_float32_precision_are_distinguished():
  labels = np.array([2**31 - 1, 2**31 - 2, 2**31 - 1], np.int32)
  pairs = pair_masks(*batches.arguments(_EMBEDDINGS, labels))
  np.testing.assert_array_equal(pairs.is_positive.numpy()[0], [False, False, True])


@pytest.mark.parametrize(
  "labels", [np.zeros((3, 1), int), np.eye(3, dtype=np.float32), np.zeros(3)]
)
def test_labels_of_different_types_are_refused(labels):
  with pytest.raises(UserError, match="one integer for each embedding"):
    check_labels(tf.constant(labels), 3)


def test_different_number_of_labels_is_refused():
  with pytest.raises(UserError, match="2 labels were given for 3 embeddings"):
    check_labels(tf.constant([1, 2]), 3)


@pytest.mark.parametrize(
  ("part", "changed", "message"),
  [
    (0, {"weights": tf.ones([3, 1])}, "weights have shape"),
    (0, {"embeddings": tf.ones([3, 1, 2])}, "one vector for each"),
    (1, {"embeddings": tf.ones([3])}, "one vector for each"),
    (1, {"is_valid": tf.ones([3, 1], tf.bool)}, "is_valid have shape"),
    (1, {"positions": tf.zeros([1], tf.int32)}, "positions have shape"),
    (1, {"is_relevant": tf.ones([1, 3], tf.bool)}, r"needed is \(3, 3\)"),
    (1, {"labels": tf.ones([3, 2], tf.bool)}, "of different kinds"),
  ],
)
def test_shapes_that_would_broadcast_are_refused(part, changed, message):
  batch = list(batches.arguments(_EMBEDDINGS, np.array([1, 1, 2])))
  check_batch(*batch)
  batch[part] = batch[part]._replace(**changed)
  with pytest.raises(UserError, match=message):
    check_batch(*batch)
