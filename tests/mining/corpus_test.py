"""The mining corpus, class means and their neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from tests.mining.corpora import Corpus
from tests.retrieval import near_embeddings
from trainer.errors import UserError
from trainer.mining.corpus import (
  NearestItems,
  class_centroids,
  empty_neighbours,
  find_class_neighbours,
)

_SIZES = (4, 9, 1, 0, 7, 30)


def test_corpus_has_all_records_of_the_classes_in_order():
  corpus = Corpus(_SIZES)
  items = corpus.items(np.array([5, 0, 3, 2], np.int32))
  expected = np.flatnonzero(np.isin(corpus.labels, [0, 2, 5]))
  np.testing.assert_array_equal(items.record_numbers, expected)
  np.testing.assert_array_equal(items.labels, corpus.labels[expected])
  np.testing.assert_array_equal(items.class_ids, [0, 2, 5])
  np.testing.assert_array_equal(items.starts, [0, 4, 5, 35])
  np.testing.assert_array_equal(items.by_class[items.positions], np.arange(35))
  np.testing.assert_array_equal(
    items.labels[items.by_class], np.repeat([0, 2, 5], [4, 1, 30])
  )
  assert items.largest_class == 30


def test_sampled_records_per_class_depend_on_the_key():
  corpus = Corpus(_SIZES)
  one, other = (corpus.items(records_per_class=6, key=key) for key in (1, 2))
  for items in (one, other):
    sizes = np.bincount(items.labels, minlength=6)
    assert sizes.tolist() == [4, 6, 1, 0, 6, 6]
    np.testing.assert_array_equal(items.labels, corpus.labels[items.record_numbers])
    assert (np.diff(items.record_numbers) > 0).all()
  assert one.record_numbers.tolist() != other.record_numbers.tolist()
  again = corpus.items(records_per_class=6, key=1)
  np.testing.assert_array_equal(one.by_class, again.by_class)


def test_class_mean_does_not_depend_on_the_chunk_size(monkeypatch):
  corpus = Corpus(_SIZES)
  items = corpus.items()
  rows = corpus.embeddings[items.record_numbers]
  expected = [rows[items.labels == label].mean(axis=0) for label in (0, 1, 2, 4, 5)]
  for num_added in (3, 10, 1000):
    monkeypatch.setattr("trainer.mining.corpus._NUM_SUMMED", num_added)
    got = class_centroids(rows, items)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_neighbours", "kind"), [(3, "exact"), (7, "flat")])
def test_neighbours_of_classes_are_the_nearest_means(num_neighbours, kind):
  means = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
  ids = np.array([1, 2, 5, 7, 8, 11], np.int32)
  got = find_class_neighbours(
    means, ids, num_classes=13, num_neighbours=num_neighbours, kind=kind
  )
  assert got.shape == (13, num_neighbours)
  for row, class_id in enumerate(ids):
    order = np.argsort(np.linalg.norm(means - means[row], axis=1), kind="stable")
    expected = ids[order[1 : num_neighbours + 1]]
    np.testing.assert_array_equal(got[class_id, : len(expected)], expected)
    assert (got[class_id, len(expected) :] == -1).all()
  assert (np.delete(got, ids, axis=0) == -1).all()


@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_neighbours_of_classes_are_exact_in_a_collapsed_space(kind):
  corpus = Corpus(_SIZES)
  items = corpus.items()
  rows = 0.3 + 1e-4 * np.random.default_rng(2).normal(size=(len(items.labels), 16))
  rows = rows.astype(np.float32)
  means = class_centroids(rows, items)
  exact = [
    np.mean(rows[items.labels == label], axis=0, dtype=np.float64)
    for label in items.class_ids
  ]
  np.testing.assert_allclose(means, exact, rtol=1e-14)
  got = find_class_neighbours(
    means, items.class_ids, num_classes=6, num_neighbours=4, kind=kind
  )
  for mean, class_id in zip(exact, items.class_ids):
    order = np.argsort(np.linalg.norm(np.array(exact) - mean, axis=1), kind="stable")
    np.testing.assert_array_equal(got[class_id], items.class_ids[order[1:]])


@pytest.mark.parametrize("kind", ["exact", "flat", "ivf_flat", "ivf_pq", "hnsw"])
@pytest.mark.parametrize("case", ["collapsed to 0.0001", "scattered by 0.0001"])
def test_close_items_are_found_at_their_true_distances(kind, case):
  embeddings = near_embeddings.CASES[case]
  asking = np.arange(0, len(embeddings), 3)
  room = empty_neighbours(len(asking), 20)
  found = NearestItems(embeddings, kind).search(asking, 20, room)
  distances = near_embeddings.true_distances(embeddings[asking], embeddings)
  is_found = found.indices >= 0
  wanted = np.take_along_axis(distances, np.maximum(found.indices, 0), axis=1)
  np.testing.assert_allclose(found.distances[is_found], wanted[is_found], rtol=1e-4)
  distances[np.arange(len(asking)), asking] = np.inf
  order = np.argsort(distances, axis=1, kind="stable")[:, :20]
  if kind in ("exact", "flat"):
    np.testing.assert_array_equal(found.indices, order)
  right = [len(np.intersect1d(*rows)) for rows in zip(found.indices, order)]
  assert np.mean(right) > 0.5 * 20


def test_a_single_class_has_no_neighbours():
  with pytest.raises(UserError, match="at least 2 classes"):
    find_class_neighbours(
      np.ones((1, 3), np.float32),
      np.zeros(1, np.int32),
      num_classes=1,
      num_neighbours=2,
      kind="exact",
    )
