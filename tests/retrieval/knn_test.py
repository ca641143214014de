"""Exact search against a sort of all distances, on one replica and on several."""

from __future__ import annotations

import numpy as np
import pytest

from tests.retrieval import near_embeddings
from tests.thorough import thorough_except
from trainer.errors import UserError
from trainer.retrieval import knn
from trainer.retrieval.ground_truth import ItemLabels, LabelGroundTruth
from trainer.retrieval.knn import nearest
from trainer.retrieval.query import sample_results


def _by_sorting(queries, gallery, num_neighbours):
  rows = []
  for query in queries:
    squares = ((gallery.astype(np.float64) - query) ** 2).sum(axis=1)
    rows.append(np.lexsort((np.arange(len(gallery)), squares))[:num_neighbours])
  return np.array(rows)


def _random(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _by_tiles(queries, gallery, num_neighbours, **sizes):
  offset = np.zeros(gallery.shape[1], np.float32)
  return knn.search_by_tiles(
    queries, gallery, offset, num_neighbours=num_neighbours, **sizes
  )[0]


@pytest.mark.parametrize("num_replicas", thorough_except([1, 2], [1, 2, 4]))
@pytest.mark.parametrize(("max_queries", "max_items"), [(1, 32), (5, 64), (100, 1000)])
def test_tiles_find_the_neighbours_of_brute_force(
  mirrored, num_replicas, max_queries, max_items
):
  queries, gallery = _random((23, 5), 1), _random((301, 5), 2)
  with mirrored(num_replicas).scope():
    got = _by_tiles(queries, gallery, 9, max_queries=max_queries, max_items=max_items)
  np.testing.assert_array_equal(got, _by_sorting(queries, gallery, 9))


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1000.0, 30_000.0])
def test_neighbours_equal_brute_force(mirrored, num_replicas, offset):
  queries, gallery = _random((23, 5), 1) + offset, _random((301, 5), 2) + offset
  with mirrored(num_replicas).scope():
    got = nearest(queries, gallery, num_neighbours=9)
  wanted = _by_sorting(queries, gallery, 9)
  np.testing.assert_array_equal(got.indices, wanted)
  distances = np.linalg.norm(
    gallery[wanted].astype(np.float64) - queries[:, None], axis=2
  )
  np.testing.assert_allclose(got.distances, distances, rtol=1e-4)


@pytest.mark.parametrize("num_neighbours", [3, 20, 150, 700])
@pytest.mark.parametrize("max_items", [32, 320, 1000])
def test_equal_distances_are_ordered_by_index(num_neighbours, max_items):
  # Small integers, so that distances are exact and many are equal.
  gallery = np.random.default_rng(5).integers(-2, 3, (700, 2)).astype(np.float32)
  wanted = _by_sorting(gallery, gallery, num_neighbours)
  by_tiles = _by_tiles(gallery, gallery, num_neighbours, max_items=max_items)
  np.testing.assert_array_equal(by_tiles, wanted)
  got = nearest(gallery, gallery, num_neighbours=num_neighbours)
  np.testing.assert_array_equal(got.indices, wanted)


@pytest.mark.parametrize("num_neighbours", [5, 1001])
def test_copies_of_an_item_are_ordered_by_index(num_neighbours):
  one = _random((1, 37), 6)
  copies = np.repeat(one, 1001, axis=0)
  by_tiles = _by_tiles(one, copies, num_neighbours, max_items=128)
  np.testing.assert_array_equal(by_tiles, [np.arange(num_neighbours)])
  got = nearest(one, copies, num_neighbours=num_neighbours)
  np.testing.assert_array_equal(got.indices, [np.arange(num_neighbours)])


def test_half_precision_items_are_used_unchanged():
  gallery = _random((300, 8), 1).astype(np.float16)
  got = nearest(gallery[:20], gallery, num_neighbours=9)
  wanted = _by_sorting(gallery[:20], gallery, 9)
  np.testing.assert_array_equal(got.indices, wanted)


@pytest.mark.parametrize("searches_by_faiss", [False, True])
def test_certain_neighbours_are_correct_for_close_items(searches_by_faiss, monkeypatch):
  monkeypatch.setattr(knn, "_NUM_ITEMS", 100)
  monkeypatch.setattr(knn, "is_faiss_used", lambda: searches_by_faiss)
  # Distances below and above the rounding error.
  base = _random((60, 16), 3)
  spreads = np.repeat(10.0 ** -np.arange(8), 40)[:, None]
  gallery = (base[:1] + spreads * _random((320, 16), 4)).astype(np.float32)
  zero = np.zeros(16, np.float32)
  found = knn.prove(
    base,
    gallery,
    zero,
    knn._candidates(base, gallery, zero, 7),
    num_neighbours=7,
    roundoff=2.0**-24,
  )
  assert found.is_proven.any() and not found.is_proven.all()
  wanted = _by_sorting(base, gallery, 7)
  np.testing.assert_array_equal(found.indices[found.is_proven], wanted[found.is_proven])


@pytest.mark.parametrize("case", near_embeddings.CASES)
@pytest.mark.parametrize("searches_by_faiss", [False, True])
@pytest.mark.parametrize("num_neighbours", [1, 30, 240])
def test_neighbours_and_distances_equal_float64_differences(
  case, searches_by_faiss, num_neighbours, monkeypatch
):
  monkeypatch.setattr(knn, "is_faiss_used", lambda: searches_by_faiss)
  gallery = near_embeddings.CASES[case]
  queries = gallery[::7]
  got = nearest(queries, gallery, num_neighbours=num_neighbours)
  wanted = near_embeddings.true_order(queries, gallery)[:, :num_neighbours]
  np.testing.assert_array_equal(got.indices, wanted)
  distances = near_embeddings.true_distances(queries, gallery)
  np.testing.assert_allclose(
    got.distances, np.take_along_axis(distances, wanted, 1), rtol=1e-6, atol=2.0**-149
  )


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_near_duplicates_are_ordered_with_exact_distances(mirrored, num_replicas):
  rng = np.random.default_rng(1)

  def unit(shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  queries = unit((20, 64))
  near = [queries + step * 1e-4 * unit((20, 64)) for step in (3, 1, 5, 2, 4)]
  gallery = np.concatenate([unit((400, 64)), *near]).astype(np.float32)
  with mirrored(num_replicas).scope():
    got = nearest(queries.astype(np.float32), gallery, num_neighbours=5)
  places = 400 + 20 * np.array([1, 3, 0, 4, 2]) + np.arange(20)[:, None]
  np.testing.assert_array_equal(got.indices, places)
  wanted = np.tile(1e-4 * np.arange(1, 6), (20, 1))
  np.testing.assert_allclose(got.distances, wanted, rtol=5e-3)


def test_low_precision_products_lose_no_neighbour(monkeypatch):
  # Like TensorFloat-32: the tiles use 11 bits of each number.
  filled = knn._pad

  def rounded(*arguments):
    bits = filled(*arguments).view(np.uint32) + np.uint32(0x800)
    return (bits & np.uint32(0xFFFFF000)).view(np.float32)

  monkeypatch.setattr(knn, "_pad", rounded)
  monkeypatch.setattr(knn, "is_faiss_used", lambda: False)
  monkeypatch.setattr(knn, "_unit_roundoff", lambda: 2.0**-11)
  queries, gallery = _random((30, 8), 1), _random((700, 8), 2)
  got = nearest(queries, gallery, num_neighbours=20)
  np.testing.assert_array_equal(got.indices, _by_sorting(queries, gallery, 20))


def test_double_precision_vectors_are_cast_to_single():
  vectors = np.random.default_rng(3).normal(size=(90, 6)) + 1e3
  got = nearest(vectors[:9], vectors, num_neighbours=4)
  wanted = nearest(np.float32(vectors[:9]), np.float32(vectors), num_neighbours=4)
  for one, other in zip(got, wanted):
    np.testing.assert_array_equal(one, other)


def test_second_search_of_equal_sizes_is_not_retraced(monkeypatch):
  traced = []
  merged = knn._merge_tile
  monkeypatch.setattr(
    knn, "_merge_tile", lambda *given: traced.append(1) or merged(*given)
  )
  for seed in (1, 2):
    _by_tiles(_random((7, 6), seed), _random((70, 6), seed), 3)
  assert len(traced) == 1


def test_empty_queries_have_no_neighbours():
  got = nearest(_random((0, 4), 1), _random((9, 4), 2), num_neighbours=3)
  assert got.indices.shape == got.distances.shape == (0, 3)


def test_k_above_the_gallery_size_is_refused():
  with pytest.raises(UserError, match=r"num_neighbours=4 exceeds the gallery size 3"):
    nearest(_random((2, 4), 1), _random((3, 4), 2), num_neighbours=4)


def test_gallery_of_different_dimensions_is_refused():
  with pytest.raises(UserError, match=r"4 dimensions .* 5"):
    nearest(_random((2, 4), 1), _random((3, 5), 2), num_neighbours=1)


def test_sampled_neighbours_omit_excluded_items():
  labels = np.repeat(np.arange(10), 4)
  cameras = np.tile([0, 0, 1, 2], 10)
  everything = np.arange(40)
  ground_truth = LabelGroundTruth(everything, everything, ItemLabels(labels), cameras)
  queries, neighbours, is_right = sample_results(
    _random((40, 3), 7), ground_truth, everything
  )
  np.testing.assert_array_equal(queries, everything)
  np.testing.assert_array_equal(
    is_right, labels[neighbours] == labels[queries][:, None]
  )
  # The first two of each class exclude each other and themselves.
  assert neighbours.shape == (40, 38)
  for query, row in zip(queries, neighbours):
    same = (labels[row] == labels[query]) & (cameras[row] == cameras[query])
    assert not same.any()
    assert len(set(row)) == 38
