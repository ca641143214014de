"""Exact search against a sort of all distances."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.retrieval.search import nearest_others


def _by_sorting(embeddings, num_neighbours):
  rows = []
  for query in range(len(embeddings)):
    distances = ((embeddings - embeddings[query]) ** 2).sum(axis=1)
    order = np.lexsort((np.arange(len(embeddings)), distances))
    rows.append([i for i in order if i != query][:num_neighbours])
  return np.array(rows)


def _all_neighbours(embeddings, **options):
  tiles = list(nearest_others(embeddings, **options))
  np.testing.assert_array_equal(
    np.concatenate([queries for queries, _ in tiles]), np.arange(len(embeddings))
  )
  return np.concatenate([neighbours for _, neighbours in tiles])


@pytest.mark.parametrize("max_distances", [1, 100, 10_000])
def test_neighbours_are_those_of_brute_force_for_any_tile(max_distances):
  embeddings = np.random.default_rng(4).normal(size=(37, 5)).astype(np.float32)
  got = _all_neighbours(embeddings, num_neighbours=9, max_distances=max_distances)
  np.testing.assert_array_equal(got, _by_sorting(embeddings.astype(np.float64), 9))


def test_equal_distances_are_ordered_by_index():
  # Small integers, so that distances are exact and many are equal.
  rng = np.random.default_rng(5)
  embeddings = rng.integers(-2, 3, size=(40, 2)).astype(np.float32)
  got = _all_neighbours(embeddings, num_neighbours=39)
  np.testing.assert_array_equal(got, _by_sorting(embeddings, 39))


def test_a_query_is_not_its_own_neighbour_even_among_duplicates():
  got = _all_neighbours(np.ones((6, 3), np.float32), num_neighbours=5)
  assert all(query not in row for query, row in enumerate(got))
