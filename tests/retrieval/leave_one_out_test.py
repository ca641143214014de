"""Leave-one-out evaluation against loops over queries."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.retrieval.leave_one_out import evaluate_leave_one_out


def _oracle(embeddings, labels, k):
  recalls, precisions, averages = [], [], []
  for query, label in enumerate(labels):
    others = np.delete(np.arange(len(labels)), query)
    distances = np.linalg.norm(embeddings[others] - embeddings[query], axis=1)
    hits = labels[others[np.argsort(distances, kind="stable")]] == label
    num_relevant = hits.sum()
    if num_relevant == 0:
      continue
    recalls.append(hits[:k].any())
    precisions.append(hits[:num_relevant].mean())
    precision_at = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    averages.append((precision_at * hits)[:num_relevant].sum() / num_relevant)
  return np.mean(recalls), np.mean(averages), np.mean(precisions), len(recalls)


def _clustered(rng):
  labels = rng.integers(0, 7, size=80)
  labels[:2] = [101, 102]  # Two items alone in their class.
  centres = rng.normal(size=(103, 6))
  return centres[labels] + rng.normal(size=(80, 6)), labels


def test_figures_are_those_of_the_definitions_on_unequal_classes():
  embeddings, labels = _clustered(np.random.default_rng(6))
  got = evaluate_leave_one_out(embeddings.astype(np.float32), labels)
  recall, map_at_r, r_precision, num_queries = _oracle(embeddings, labels, 5)
  assert got["eval/recall_at_5"] == pytest.approx(recall)
  assert got["eval/map_at_r"] == pytest.approx(map_at_r)
  assert got["eval/r_precision"] == pytest.approx(r_precision)
  assert got["eval/num_queries"] == num_queries


def test_queries_without_a_relevant_item_are_counted_and_left_out():
  embeddings, labels = _clustered(np.random.default_rng(7))
  got = evaluate_leave_one_out(embeddings.astype(np.float32), labels)
  assert got["eval/num_queries_without_relevant"] == 2


def test_perfect_clusters_give_one():
  labels = np.repeat([3, 5, 9], 4)
  embeddings = np.eye(10, dtype=np.float32)[labels]
  got = evaluate_leave_one_out(embeddings, labels)
  assert [got[f"eval/{name}"] for name in ("recall_at_1", "map_at_r")] == [1.0, 1.0]


def test_nothing_to_find_is_refused():
  with pytest.raises(UserError, match="at least two items"):
    evaluate_leave_one_out(np.eye(3, dtype=np.float32), np.arange(3))


def test_embeddings_that_are_not_finite_are_counted_and_refused():
  embeddings = np.zeros((4, 2), np.float32)
  embeddings[1, 0] = np.nan
  with pytest.raises(UserError, match="1 of 4 embeddings"):
    evaluate_leave_one_out(embeddings, np.zeros(4, int))
