"""Verification and clustering against loops from their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

from trainer.errors import UserError
from trainer.retrieval.metrics import Clustering, Verification


def _items(num_items=40, spread=1.0, seed=1):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 5, num_items)
  centres = rng.normal(size=(5, 4))
  embeddings = centres[labels] + spread * rng.normal(size=(num_items, 4))
  return embeddings.astype(np.float32), labels


def _distances(embeddings, labels, groups=None):
  """Returns distances of positive pairs of different groups, and of negative pairs."""
  sides = {True: [], False: []}
  for one, other in itertools.combinations(range(len(labels)), 2):
    is_positive = bool(labels[one] == labels[other])
    if is_positive and groups is not None and groups[one] == groups[other]:
      continue
    distance = np.linalg.norm(embeddings[one] - embeddings[other])
    sides[is_positive].append(float(distance))
  return sides[True], sides[False]


def test_auc_is_the_fraction_of_correctly_ordered_pairs():
  embeddings, labels = _items()
  positives, negatives = _distances(embeddings, labels)
  wins = [(p < n) + (p == n) / 2 for p in positives for n in negatives]
  got = Verification().measure(embeddings, labels)
  assert got["eval/roc_auc"] == pytest.approx(np.mean(wins))
  is_positive = np.repeat([1, 0], [len(positives), len(negatives)])
  of_scikit_learn = roc_auc_score(is_positive, -np.array([*positives, *negatives]))
  assert got["eval/roc_auc"] == pytest.approx(of_scikit_learn)


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_true_positive_rate_is_the_largest_a_threshold_allows(rate):
  embeddings, labels = _items()
  positives, negatives = _distances(embeddings, labels)
  allowed = [
    np.mean(np.array(positives) <= threshold)
    for threshold in [-1.0, *positives, *negatives]
    if np.mean(np.array(negatives) <= threshold) <= rate
  ]
  got = Verification(false_positive_rates=(rate,)).measure(embeddings, labels)
  assert got[f"eval/tpr_at_fpr_{rate:g}"] == pytest.approx(max(allowed))


def test_best_threshold_maximizes_balanced_accuracy():
  embeddings, labels = _items()
  positives, negatives = (np.array(side) for side in _distances(embeddings, labels))
  accuracies = {
    t: (np.mean(positives <= t) + np.mean(negatives > t)) / 2
    for t in [*positives, *negatives]
  }
  got = Verification().measure(embeddings, labels)
  assert got["eval/best_balanced_accuracy"] == pytest.approx(max(accuracies.values()))
  best = max(accuracies, key=accuracies.get)
  assert got["eval/best_threshold"] == pytest.approx(best, rel=1e-6)


def test_sampled_pairs_approximate_all_pairs():
  embeddings, labels = _items(300)
  whole = Verification().measure(embeddings, labels)
  drawn = Verification(max_pairs=10_000).measure(embeddings, labels)
  assert drawn["eval/roc_auc"] == pytest.approx(whole["eval/roc_auc"], abs=0.01)
  assert drawn["eval/roc_auc"] != whole["eval/roc_auc"]


# From slightly more than all pairs to a hundred times as many.
@pytest.mark.parametrize("max_pairs", [30, 1_500, 4_500, 7_600])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_metrics_do_not_depend_on_the_order_of_items(max_pairs, is_reversed):
  # Four classes coincide, twelve are far apart; 7,680 negative pairs.
  rng = np.random.default_rng(8)
  labels = np.repeat(np.arange(16), 8)
  centres = 10.0 * rng.normal(size=(16, 6))
  centres[:4] = centres[0]
  embeddings = centres[labels] + 0.3 * rng.normal(size=(128, 6))
  if is_reversed:
    embeddings, labels = embeddings[::-1], labels[::-1]
  embeddings = embeddings.astype(np.float32)
  positives, negatives = map(np.array, _distances(embeddings, labels))
  wins = np.mean(negatives > np.median(positives))
  drawn = [
    _drawn_distances(embeddings, labels, max_pairs=max_pairs, seed=seed)[1]
    for seed in range(10)
  ]
  got = np.mean([negatives > np.median(positives) for negatives in drawn])
  left_out = 1 - max_pairs / len(negatives)
  deviation = np.sqrt(wins * (1 - wins) * left_out / (10 * max_pairs))
  assert got == pytest.approx(wins, abs=4 * deviation)


def _drawn_distances(embeddings, labels, **options):
  pairs = Verification(**options)._pairs(labels)
  return [
    np.linalg.norm(embeddings[side[:, 0]] - embeddings[side[:, 1]], axis=1)
    for side in pairs
  ]


@pytest.mark.parametrize("max_pairs", [3, 17, 40])
def test_each_pair_is_drawn_equally_often_and_never_twice(max_pairs):
  labels = np.array([3, 0, 1, 3, 1, 3, 0, 3, 3, 2, 3, 1])
  num_draws = 1_500
  counts = np.zeros([2, 12, 12])
  for seed in range(num_draws):
    for kind, side in enumerate(
      Verification(max_pairs=max_pairs, seed=seed)._pairs(labels)
    ):
      one, other = np.sort(side, axis=1).T
      assert len(set(zip(one.tolist(), other.tolist()))) == len(side)
      counts[kind, one, other] += 1
  is_same = labels[:, None] == labels
  is_pair = np.triu(np.ones([12, 12], bool), 1)
  for kind, is_of_kind in enumerate((is_pair & is_same, is_pair & ~is_same)):
    assert not counts[kind][~is_of_kind].any()
    share = min(1.0, max_pairs / is_of_kind.sum())
    deviation = np.sqrt(num_draws * share * (1 - share))
    assert np.abs(counts[kind][is_of_kind] - num_draws * share).max() <= 4.5 * deviation


def test_memory_of_sampling_depends_only_on_the_number_of_pairs():
  labels = np.arange(60_000) // 3  # 1.8 billion negative pairs.
  positives, negatives = Verification(max_pairs=5_000)._pairs(labels)
  assert len(positives) == len(negatives) == 5_000
  assert (labels[positives[:, 0]] == labels[positives[:, 1]]).all()
  assert (labels[negatives[:, 0]] != labels[negatives[:, 1]]).all()
  assert abs(negatives.mean() / 60_000 - 0.5) < 0.01


def test_metrics_of_close_pairs_are_exact_far_from_zero():
  embeddings, labels = _items()
  embeddings = (
    np.round(embeddings * 2**10) / 2**10
  )  # On a grid that is exact at both locations.
  near = Verification().measure(embeddings.astype(np.float32), labels)
  far = Verification().measure((embeddings + 4096.0).astype(np.float32), labels)
  assert far == pytest.approx(near, rel=1e-12)


def test_empty_galleries_have_no_pairs():
  found = Verification().measure(np.zeros([0, 3], np.float32), np.zeros(0, int))
  assert found == {}


def test_one_class_has_no_negative_pairs_to_verify():
  assert Verification().measure(np.eye(3, dtype=np.float32), np.zeros(3, int)) == {}


def test_missing_pairs_are_refused():
  with pytest.raises(UserError, match="max_pairs=0"):
    Verification(max_pairs=0).measure(*_items())


def test_clusters_equal_to_the_classes_score_one():
  embeddings, labels = _items(spread=0.001)
  assert Clustering().measure(embeddings, labels)["eval/nmi"] == pytest.approx(1.0)


def test_clustering_is_exact_in_a_collapsed_space():
  embeddings, labels = _items(spread=0.001)
  collapsed = (np.float64(embeddings) * 1e-4 + 0.5).astype(np.float32)
  assert Clustering().measure(collapsed, labels)["eval/nmi"] == pytest.approx(1.0)


def test_clustering_score_equals_the_mutual_information():
  embeddings, labels = _items(60)
  clusters = KMeans(5, n_init=1, random_state=0).fit_predict(embeddings)
  joint = np.zeros([5, 5])
  for cluster, label in zip(clusters, labels):
    joint[cluster, label] += 1 / 60
  rows, columns = joint.sum(axis=1), joint.sum(axis=0)
  information = sum(
    joint[i, j] * np.log(joint[i, j] / (rows[i] * columns[j]))
    for i in range(5)
    for j in range(5)
    if joint[i, j]
  )
  entropies = [-sum(p * np.log(p) for p in side if p) for side in (rows, columns)]
  got = Clustering().measure(embeddings, labels)["eval/nmi"]
  assert got == pytest.approx(2 * information / sum(entropies))


def test_clusters_of_noise_have_a_low_score():
  labels = np.random.default_rng(2).integers(0, 5, 2000)
  embeddings = np.random.default_rng(3).normal(size=(2000, 4)).astype(np.float32)
  assert Clustering().measure(embeddings, labels)["eval/nmi"] < 0.02


def test_clustering_draws_whole_classes():
  embeddings, labels = _items(300, spread=0.001)
  got = Clustering(max_items=150).measure(embeddings, labels)
  assert got["eval/nmi"] == pytest.approx(1.0)


def test_equal_embeddings_have_a_finite_threshold():
  found = Verification().measure(np.ones((6, 3), np.float32), np.arange(6) // 2)
  assert found["eval/best_threshold"] == 0.0
  assert found["eval/best_balanced_accuracy"] == 0.5


def test_pairs_of_the_same_group_are_excluded():
  embeddings, labels = _items()
  groups = np.arange(len(labels)) % 2
  positives, negatives = _distances(embeddings, labels, groups)
  wins = [(p < n) + (p == n) / 2 for p in positives for n in negatives]
  got = Verification().measure(embeddings, labels, groups)
  assert got["eval/roc_auc"] == pytest.approx(np.mean(wins))


def test_few_positive_pairs_are_all_used():
  embeddings, labels = _items(400)
  labels = np.arange(400) // 2  # 200 positive pairs, 79,600 negative.
  positives, _ = _distances(embeddings, labels)
  drawn = Verification(max_pairs=1_000).measure(embeddings, labels)
  # The rates of positives are multiples of 1/200.
  rate = drawn["eval/tpr_at_fpr_0.1"] * 200
  assert rate == pytest.approx(round(rate), abs=1e-9)
  assert len(positives) == 200
