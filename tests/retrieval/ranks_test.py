"""Ranks of relevant items against a sort of all distances."""

from __future__ import annotations

import numpy as np
import pytest

from tests.retrieval import near_embeddings, rank_oracles
from trainer.retrieval import ranking
from trainer.retrieval.ground_truth import ItemLabels, LabelGroundTruth
from trainer.retrieval.ranking import ranks_of_relevant


def _leave_one_out(labels):
  everything = np.arange(len(labels))
  return LabelGroundTruth(everything, everything, ItemLabels(labels))


def _expected(embeddings, labels):
  rows = []
  for query, label in enumerate(labels):
    relevant = set(np.flatnonzero(labels == label)) - {query}
    hits = rank_oracles.hits_of(embeddings[query], embeddings, relevant, {query})
    rows.append([rank for rank, hit in enumerate(hits, 1) if hit])
  return rows


def _got(embeddings, labels, **options):
  embeddings = embeddings.astype(np.float32)
  found = ranks_of_relevant(embeddings, embeddings, _leave_one_out(labels), **options)
  return [ranks.tolist() for ranks in found]


@pytest.mark.parametrize("max_distances", [1, 150, 100_000])
def test_ranks_are_those_of_a_sort_for_any_tile(max_distances):
  rng = np.random.default_rng(4)
  embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
  got = _got(embeddings, labels, max_distances=max_distances)
  assert got == _expected(embeddings, labels)


@pytest.mark.parametrize("max_counted", [0, 1000])
def test_equal_distances_rank_by_index_counted_or_sorted(max_counted, monkeypatch):
  monkeypatch.setattr(ranking, "_MAX_COUNTED", max_counted)
  # Small integers, so that distances are exact and many are equal.
  rng = np.random.default_rng(5)
  embeddings, labels = rng.integers(-2, 3, (80, 2)), rng.integers(0, 4, 80)
  assert _got(embeddings, labels) == _expected(embeddings, labels)


def test_an_item_alone_in_its_class_has_no_ranks():
  got = _got(np.eye(3), np.array([0, 1, 1]))
  assert [len(ranks) for ranks in got] == [0, 1, 1]


@pytest.mark.parametrize("num_queries", [1, 3, 30])
def test_copies_rank_by_index_however_many_ask(num_queries):
  rng = np.random.default_rng(6)
  gallery = np.repeat(rng.normal(size=(1, 37)).astype(np.float32), 30, axis=0)
  judged = LabelGroundTruth(
    np.arange(30, 30 + num_queries), np.arange(30), ItemLabels(np.zeros(60, int))
  )
  queries = rng.normal(size=(num_queries, 37)).astype(np.float32)
  for ranks in ranks_of_relevant(queries, gallery, judged):
    np.testing.assert_array_equal(ranks, np.arange(1, 31))


def test_a_common_offset_changes_no_rank():
  rng = np.random.default_rng(7)
  embeddings, labels = rng.normal(size=(90, 16)), rng.integers(0, 9, 90)
  # Far away float32 has a grid of 2^-14 there, on which both stand.
  embeddings = np.round(embeddings * 2**10) / 2**10
  assert _got(embeddings + 1000.0, labels) == _got(embeddings, labels)


def _true_ranks(embeddings, labels):
  """Of each item, by its float64 differences from all others."""
  found = []
  for query, order in enumerate(near_embeddings.true_order(embeddings, embeddings)):
    others = order[order != query]
    found.append((np.flatnonzero(labels[others] == labels[query]) + 1).tolist())
  return found


@pytest.mark.parametrize("case", near_embeddings.CASES)
@pytest.mark.parametrize(
  ("num_classes", "max_counted", "max_share"),
  [(60, 64, 1 / 32), (60, 0, 1.0), (3, 64, 1 / 32), (3, 64, 1.0), (3, 1000, 0.0)],
)
def test_ranks_are_those_of_float64_differences(
  case, num_classes, max_counted, max_share, monkeypatch
):
  monkeypatch.setattr(ranking, "_MAX_COUNTED", max_counted)
  monkeypatch.setattr(ranking, "_MAX_SHARE_UNDECIDED", max_share)
  embeddings = near_embeddings.CASES[case]
  labels = np.random.default_rng(8).integers(0, num_classes, len(embeddings))
  assert _got(embeddings, labels) == _true_ranks(embeddings, labels)


def test_queries_apart_from_their_gallery_are_ranked_by_float64_differences():
  gallery = near_embeddings.scattered(1e-4)
  queries = near_embeddings.scattered(3e-4, num_items=50) + np.float32(1e-3)
  labels = np.random.default_rng(9).integers(0, 20, 290)
  judged = LabelGroundTruth(np.arange(240, 290), np.arange(240), ItemLabels(labels))
  order = near_embeddings.true_order(queries, gallery)
  for query, ranks in enumerate(ranks_of_relevant(queries, gallery, judged)):
    is_relevant = labels[order[query]] == labels[240 + query]
    np.testing.assert_array_equal(ranks, np.flatnonzero(is_relevant) + 1)


def test_excluded_items_are_not_counted_where_float32_decides_nothing():
  embeddings, labels = near_embeddings.CASES["huge"], np.arange(240) % 6
  cameras = np.arange(240) % 4
  everything = np.arange(240)
  judged = LabelGroundTruth(everything, everything, ItemLabels(labels), cameras)
  order = near_embeddings.true_order(embeddings, embeddings)
  for query, ranks in enumerate(ranks_of_relevant(embeddings, embeddings, judged)):
    relevant, excluded = judged.judge(query)
    others = order[query][~np.isin(order[query], excluded)]
    np.testing.assert_array_equal(ranks, np.flatnonzero(np.isin(others, relevant)) + 1)
