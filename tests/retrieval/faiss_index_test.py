"""Indexes of FAISS: what they find, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.retrieval import faiss_index
from trainer.retrieval.faiss_index import KeptIndex
from trainer.retrieval.search import nearest


def _embeddings(num_items=2_000, num_dimensions=16):
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(50, num_dimensions))
  items = centres[rng.integers(0, 50, num_items)]
  items += 0.3 * rng.normal(size=items.shape)
  return items.astype(np.float32)


@pytest.mark.parametrize(
  ("kind", "least_recall"),
  [("flat", 0.999), ("hnsw", 0.95), ("ivf_flat", 0.8), ("ivf_pq", 0.7)],
)
def test_each_kind_finds_most_of_what_exact_search_finds(kind, least_recall, tmp_path):
  embeddings = _embeddings()
  index = faiss_index.build(embeddings, kind)
  measured = faiss_index.measure(index, embeddings)
  assert least_recall <= measured["recall_at_10"] <= 1.0
  assert measured["queries_per_second"] > 0
  faiss_index.write(str(tmp_path), index, {"kind": kind})
  kept = KeptIndex(str(tmp_path))
  found = kept.nearest(embeddings[:50], num_neighbours=10)
  exact = nearest(embeddings[:50], embeddings, num_neighbours=10)
  same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*(found[:1] + exact[:1]))])
  assert same >= least_recall - 0.1
  assert kept.manifest["num_items"] == 2_000


def test_the_item_that_asks_does_not_count_as_found():
  class Itself:
    def search(self, queries, k):
      """Finds the item that asks, and nothing else."""
      found = np.full([len(queries), k], -1)
      found[:, 0] = np.arange(len(queries))
      return np.zeros([len(queries), k]), found

  assert faiss_index.measure(Itself(), _embeddings(100))["recall_at_10"] == 0.0


def test_a_single_item_has_nothing_to_measure():
  embeddings = _embeddings(1)
  index = faiss_index.build(embeddings, "flat")
  assert faiss_index.measure(index, embeddings) == {}


def test_a_flat_index_gives_the_distances_of_exact_search(tmp_path):
  embeddings = _embeddings()
  faiss_index.write(str(tmp_path), faiss_index.build(embeddings, "flat"), {})
  found = KeptIndex(str(tmp_path)).nearest(embeddings[:9] + 0.01, num_neighbours=5)
  exact = nearest(embeddings[:9] + 0.01, embeddings, num_neighbours=5)
  np.testing.assert_array_equal(found.indices, exact.indices)
  np.testing.assert_allclose(found.distances, exact.distances, atol=1e-3)


@pytest.mark.parametrize(
  ("num_items", "kind"),
  [(20_000, "flat"), (20_001, "ivf_flat"), (999_999, "ivf_flat"), (10**6, "ivf_pq")],
)
def test_the_kind_goes_by_the_number_of_items(num_items, kind):
  assert faiss_index.choose_kind(num_items) == kind


@pytest.mark.parametrize(("num_items", "kind"), [(30, "ivf_flat"), (38, "ivf_pq")])
def test_too_few_items_for_cells_are_refused(num_items, kind):
  with pytest.raises(UserError, match="too few"):
    faiss_index.build(_embeddings(num_items), kind)


def test_an_unknown_kind_is_refused():
  with pytest.raises(UserError, match="'tree'"):
    faiss_index.build(_embeddings(30), "tree")


@pytest.fixture
def folder(tmp_path):
  faiss_index.write(str(tmp_path), faiss_index.build(_embeddings(50), "flat"), {})
  return tmp_path


def test_a_flipped_byte_is_found(folder):
  content = bytearray((folder / "index.faiss").read_bytes())
  content[100] ^= 1
  (folder / "index.faiss").write_bytes(content)
  with pytest.raises(UserError, match=r"is not the index of which manifest\.json"):
    KeptIndex(str(folder))


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"num_items": 3})])
def test_a_manifest_that_says_nothing_is_no_index(folder, content):
  (folder / "manifest.json").write_text(content)
  with pytest.raises(UserError, match="run --mode=index first"):
    KeptIndex(str(folder))


def test_more_neighbours_than_items_are_refused(folder):
  with pytest.raises(UserError, match="51 neighbours"):
    KeptIndex(str(folder)).nearest(_embeddings(2), num_neighbours=51)


def test_queries_of_other_dimensions_are_refused(folder):
  with pytest.raises(UserError, match=r"8 dimensions .* 16"):
    KeptIndex(str(folder)).nearest(_embeddings(2, 8), num_neighbours=1)
