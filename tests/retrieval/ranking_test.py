"""Ranks of relevant items against a sort of all distances."""

from __future__ import annotations

import numpy as np
import pytest

from tests.retrieval import near_embeddings, rank_oracles
from trainer.errors import UserError
from trainer.retrieval import ranking
from trainer.retrieval.ground_truth import (
  ItemLabels,
  LabelGroundTruth,
  LeaveOneOut,
  QueryAndGallery,
  Relevance,
)
from trainer.retrieval.metrics import bootstrap_intervals
from trainer.retrieval.ranking import rank, ranks_of_relevant


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
def test_ranks_equal_those_of_a_sort_for_any_tile(max_distances):
  rng = np.random.default_rng(4)
  embeddings, labels = rng.normal(size=(60, 5)), rng.integers(0, 9, 60)
  got = _got(embeddings, labels, max_distances=max_distances)
  assert got == _expected(embeddings, labels)


@pytest.mark.parametrize("max_counted", [0, 1000])
def test_ties_rank_by_index_counted_or_sorted(max_counted, monkeypatch):
  monkeypatch.setattr(ranking, "_MAX_COUNTED", max_counted)
  # Small integers, so that distances are exact and many are equal.
  rng = np.random.default_rng(5)
  embeddings, labels = rng.integers(-2, 3, (80, 2)), rng.integers(0, 4, 80)
  assert _got(embeddings, labels) == _expected(embeddings, labels)


def test_an_item_alone_in_its_class_has_no_ranks():
  got = _got(np.eye(3), np.array([0, 1, 1]))
  assert [len(ranks) for ranks in got] == [0, 1, 1]


@pytest.mark.parametrize("num_queries", [1, 3, 30])
def test_copies_rank_by_index_for_any_number_of_queries(num_queries):
  rng = np.random.default_rng(6)
  gallery = np.repeat(rng.normal(size=(1, 37)).astype(np.float32), 30, axis=0)
  ground_truth = LabelGroundTruth(
    np.arange(30, 30 + num_queries), np.arange(30), ItemLabels(np.zeros(60, int))
  )
  queries = rng.normal(size=(num_queries, 37)).astype(np.float32)
  for ranks in ranks_of_relevant(queries, gallery, ground_truth):
    np.testing.assert_array_equal(ranks, np.arange(1, 31))


def test_common_offset_does_not_change_ranks():
  rng = np.random.default_rng(7)
  embeddings, labels = rng.normal(size=(90, 16)), rng.integers(0, 9, 90)
  # With the offset float32 has a grid of 2^-14, which represents both exactly.
  embeddings = np.round(embeddings * 2**10) / 2**10
  assert _got(embeddings + 1000.0, labels) == _got(embeddings, labels)


def _true_ranks(embeddings, labels):
  """Returns the ranks of each item by float64 differences."""
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
def test_ranks_equal_those_of_float64_differences(
  case, num_classes, max_counted, max_share, monkeypatch
):
  monkeypatch.setattr(ranking, "_MAX_COUNTED", max_counted)
  monkeypatch.setattr(ranking, "_MAX_SHARE_UNDECIDED", max_share)
  embeddings = near_embeddings.CASES[case]
  labels = np.random.default_rng(8).integers(0, num_classes, len(embeddings))
  assert _got(embeddings, labels) == _true_ranks(embeddings, labels)


def test_separate_queries_have_ranks_of_float64_differences():
  gallery = near_embeddings.scattered(1e-4)
  queries = near_embeddings.scattered(3e-4, num_items=50) + np.float32(1e-3)
  labels = np.random.default_rng(9).integers(0, 20, 290)
  ground_truth = LabelGroundTruth(
    np.arange(240, 290), np.arange(240), ItemLabels(labels)
  )
  order = near_embeddings.true_order(queries, gallery)
  for query, ranks in enumerate(ranks_of_relevant(queries, gallery, ground_truth)):
    is_relevant = labels[order[query]] == labels[240 + query]
    np.testing.assert_array_equal(ranks, np.flatnonzero(is_relevant) + 1)


def test_excluded_items_are_not_counted_in_a_collapsed_space():
  embeddings, labels = near_embeddings.CASES["huge"], np.arange(240) % 6
  cameras = np.arange(240) % 4
  everything = np.arange(240)
  ground_truth = LabelGroundTruth(everything, everything, ItemLabels(labels), cameras)
  order = near_embeddings.true_order(embeddings, embeddings)
  for query, ranks in enumerate(
    ranks_of_relevant(embeddings, embeddings, ground_truth)
  ):
    relevant, excluded = ground_truth.relevant_and_excluded(query)
    others = order[query][~np.isin(order[query], excluded)]
    np.testing.assert_array_equal(ranks, np.flatnonzero(np.isin(others, relevant)) + 1)


_KS = (1, 5)


class _Items:
  """Items of given labels and features."""

  def __init__(self, labels, **features):
    self.labels = np.asarray(labels, np.int32)
    self.class_names = [f"class {n}" for n in range(max(labels) + 1)]
    self._features = features

  def feature(self, name):
    return self._features[name]


def _embeddings(num_items, seed=2):
  return np.random.default_rng(seed).normal(size=(num_items, 4)).astype(np.float32)


def _labels(num_items, num_classes, seed=3):
  return np.random.default_rng(seed).integers(0, num_classes, num_items)


def _expected_of_rankings(embeddings, queries, gallery, is_relevant, is_excluded):
  """Returns means by loops; the two functions take a query and a gallery item."""
  rows = []
  for query in queries:
    kept = [item for item in gallery if not is_excluded(query, item)]
    relevant = {n for n, item in enumerate(kept) if is_relevant(query, item)}
    hits = rank_oracles.hits_of(embeddings[query], embeddings[kept], relevant, set())
    if any(hits):
      rows.append(rank_oracles.expected(hits, _KS))
  return {**rank_oracles.means(rows), "eval/num_queries": len(rows)}


def _measured(embeddings, protocol, items):
  found = rank(embeddings, protocol.make_ground_truth(items), ks=_KS).means()
  found.pop("eval/num_queries_without_relevant")
  return found


def test_relevant_items_are_the_others_of_the_class():
  embeddings, labels = _embeddings(50), _labels(50, 9)
  wanted = _expected_of_rankings(
    embeddings,
    range(50),
    range(50),
    lambda q, g: labels[q] == labels[g],
    lambda q, g: q == g,
  )
  got = _measured(embeddings, LeaveOneOut(), _Items(labels))
  assert got == pytest.approx(wanted, rel=1e-9)


def test_pairs_of_the_same_class_and_camera_are_excluded():
  embeddings, labels, cameras = _embeddings(60), _labels(60, 6), _labels(60, 3, seed=9)
  relevance = Relevance(excluded_feature="camera")
  items = _Items(labels, camera=[[f"camera {c}"] for c in cameras])
  wanted = _expected_of_rankings(
    embeddings,
    range(60),
    range(60),
    lambda q, g: labels[q] == labels[g],
    lambda q, g: labels[q] == labels[g] and cameras[q] == cameras[g],
  )
  got = _measured(embeddings, LeaveOneOut(relevance), items)
  assert got == pytest.approx(wanted, rel=1e-9)


def test_queries_are_ranked_in_a_separate_gallery():
  embeddings, labels = _embeddings(60), _labels(60, 5)
  roles = [("query", "gallery", "unused")[n % 3] for n in range(60)]
  wanted = _expected_of_rankings(
    embeddings,
    [n for n in range(60) if roles[n] == "query"],
    [n for n in range(60) if roles[n] == "gallery"],
    lambda q, g: labels[q] == labels[g],
    lambda q, g: False,
  )
  items = _Items(labels, role=[[role] for role in roles])
  got = _measured(embeddings, QueryAndGallery(), items)
  assert got == pytest.approx(wanted, rel=1e-9)


def test_items_that_share_a_label_are_relevant():
  rng = np.random.default_rng(8)
  embeddings = _embeddings(40)
  tags = [[f"tag {t}" for t in set(rng.integers(0, 8, 2))] for _ in range(40)]
  wanted = _expected_of_rankings(
    embeddings,
    range(40),
    range(40),
    lambda q, g: bool(set(tags[q]) & set(tags[g])),
    lambda q, g: q == g,
  )
  items = _Items([0] * 40, tags=tags)
  got = _measured(embeddings, LeaveOneOut(Relevance(labels_feature="tags")), items)
  assert got == pytest.approx(wanted, rel=1e-9)


def test_distractors_are_ranked_but_never_query_or_relevant():
  embeddings, labels = _embeddings(40), _labels(40, 4)
  queries = np.flatnonzero(labels != 2)
  wanted = _expected_of_rankings(
    embeddings,
    queries,
    range(40),
    lambda q, g: labels[q] == labels[g],
    lambda q, g: q == g,
  )
  relevance = Relevance(distractor_classes=("class 2",))
  got = _measured(embeddings, LeaveOneOut(relevance), _Items(labels))
  assert got == pytest.approx(wanted, rel=1e-9)


def test_queries_without_a_relevant_item_are_reported_and_excluded():
  embeddings = np.eye(5, dtype=np.float32)
  found = rank(
    embeddings, LeaveOneOut().make_ground_truth(_Items([0, 1, 0, 0, 2])), ks=_KS
  )
  np.testing.assert_array_equal(found.queries_without_relevant, [1, 4])
  assert found.means()["eval/num_queries"] == 3
  assert found.means()["eval/num_queries_without_relevant"] == 2


def test_groups_are_sorted_worst_first():
  embeddings = np.array([[0, 0], [0, 1], [9, 9], [0, 0.5], [9, 8]], np.float32)
  labels = np.array([0, 0, 1, 2, 1])
  found = rank(embeddings, LeaveOneOut().make_ground_truth(_Items(labels)), ks=_KS)
  rows = found.by_group(labels)
  assert list(rows) == [0, 1]
  assert rows[0]["eval/recall_at_1"] == 0.0
  assert rows[1] == {**rows[1], "num_queries": 2, "eval/recall_at_1": 1.0}


def test_group_metrics_are_means_over_their_queries():
  embeddings, labels, categories = _embeddings(60), _labels(60, 9), _labels(60, 4, 5)
  found = rank(embeddings, LeaveOneOut().make_ground_truth(_Items(labels)), ks=_KS)
  rows = found.by_group(categories)
  for category in range(4):
    of_category = found.values[categories[found.queries] == category]
    assert rows[category]["num_queries"] == len(of_category)
    wanted = dict(zip(found.names, of_category.mean(axis=0)))
    got = {name: rows[category][name] for name in found.names}
    assert got == pytest.approx(wanted)


def test_intervals_are_quantiles_of_resampled_means():
  values = np.random.default_rng(3).random((50, 1))
  rng = np.random.default_rng(11)
  means = [values[rng.integers(50, size=50), 0].mean() for _ in range(20_000)]
  [[low, high]] = bootstrap_intervals(values)
  assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_intervals_contain_the_means_and_narrow_with_more_queries():
  widths = []
  for num_items in (40, 640):
    labels = _labels(num_items, 4)
    found = rank(
      _embeddings(num_items), LeaveOneOut().make_ground_truth(_Items(labels)), ks=_KS
    )
    means, intervals = found.means(), found.intervals()
    assert all(low <= means[name] <= high for name, (low, high) in intervals.items())
    low, high = intervals["eval/recall_at_1"]
    widths.append(high - low)
  # 16 times the queries: a quarter of the width.
  assert widths[1] == pytest.approx(widths[0] / 4, rel=0.5)


def test_missing_relevant_items_are_refused():
  ground_truth = LeaveOneOut().make_ground_truth(_Items([0, 1, 2]))
  with pytest.raises(UserError, match="at least two items"):
    rank(np.eye(3, dtype=np.float32), ground_truth, ks=_KS)


def test_nonfinite_embeddings_are_counted_and_refused():
  embeddings = np.zeros((4, 2), np.float32)
  embeddings[1, 0] = np.nan
  with pytest.raises(UserError, match="1 of 4 embeddings"):
    rank(embeddings, LeaveOneOut().make_ground_truth(_Items([0, 0, 0, 0])), ks=_KS)


@pytest.mark.parametrize("ks", [(), (0, 1)])
def test_a_k_below_one_is_refused(ks):
  ground_truth = LeaveOneOut().make_ground_truth(_Items([0, 0]))
  with pytest.raises(UserError, match=r"evaluate\.ks"):
    rank(np.eye(2, dtype=np.float32), ground_truth, ks=ks)


def test_unknown_role_is_refused_with_the_existing_roles():
  items = _Items([0, 0], role=[["probe"], ["gallery"]])
  with pytest.raises(UserError, match="role='query'; the values are gallery, probe"):
    QueryAndGallery().make_ground_truth(items)


def test_an_unknown_distractor_is_refused():
  relevance = Relevance(distractor_classes=("junk",))
  with pytest.raises(UserError, match="'junk' is not a class"):
    LeaveOneOut(relevance).make_ground_truth(_Items([0, 0]))
