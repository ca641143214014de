from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer.losses.loss_terms import lists_of_pairs, pair_masks, positive_lists


def _columns(lists):
  """The positives of each anchor, as sets."""
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


def test_anchors_that_are_some_of_the_candidates_have_their_own_lists():
  embeddings, labels = batches.random_batch("unbalanced")
  arguments = batches.arguments(embeddings, labels, rows=[4, 9, 2])
  assert _columns(positive_lists(*arguments)) == _expected(*arguments)


def test_several_labels_an_example_have_lists_too():
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
