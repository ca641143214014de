"""FAISS indexes: results and refused inputs."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest

from tests.retrieval import near_embeddings
from trainer.errors import UserError
from trainer.retrieval import faiss_index
from trainer.retrieval.faiss_index import StoredIndex
from trainer.retrieval.knn import nearest


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
def test_every_index_type_has_high_recall(kind, least_recall, tmp_path):
  embeddings = _embeddings()
  index = faiss_index.build_index(embeddings, kind)
  measured = faiss_index.measure_index(index, embeddings)
  assert least_recall <= measured["recall_at_10"] <= 1.0
  assert measured["queries_per_second"] > 0
  faiss_index.write_index(str(tmp_path), index, {"kind": kind})
  kept = StoredIndex(str(tmp_path))
  found = kept.nearest(embeddings[:50], embeddings, num_neighbours=10)
  exact = nearest(embeddings[:50], embeddings, num_neighbours=10)
  same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*(found[:1] + exact[:1]))])
  assert same >= least_recall - 0.1
  assert kept.manifest["num_items"] == 2_000


def test_query_item_is_excluded_from_its_results():
  class Itself:
    def search(self, queries, k):
      """Finds only the query item."""
      found = np.full([len(queries), k], -1)
      found[:, 0] = np.arange(len(queries))
      return np.zeros([len(queries), k]), found

  assert faiss_index.measure_index(Itself(), _embeddings(100))["recall_at_10"] == 0.0


def test_recall_of_a_single_item_is_not_measured():
  embeddings = _embeddings(1)
  index = faiss_index.build_index(embeddings, "flat")
  assert faiss_index.measure_index(index, embeddings) == {}


@pytest.mark.parametrize("kind", faiss_index.KINDS)
def test_results_have_the_order_and_distances_of_differences(kind, tmp_path):
  embeddings = near_embeddings.scattered(1e-4, num_items=1_000)
  queries = embeddings[:40] + np.float32(1e-5)
  index = faiss_index.build_index(embeddings, kind)
  faiss_index.write_index(str(tmp_path), index, {"kind": kind})
  found = StoredIndex(str(tmp_path)).nearest(queries, embeddings, num_neighbours=5)
  distances = near_embeddings.true_distances(queries, embeddings)
  wanted = np.take_along_axis(distances, found.indices, axis=1)
  np.testing.assert_allclose(found.distances, wanted, rtol=1e-6)
  assert (np.diff(found.distances, axis=1) >= 0).all()
  if kind == "flat":
    order = near_embeddings.true_order(queries, embeddings)
    np.testing.assert_array_equal(found.indices, order[:, :5])


@pytest.mark.parametrize(
  ("kind", "least_recall"), [("flat", 0.999), ("hnsw", 0.95), ("ivf_flat", 0.8)]
)
def test_index_of_a_collapsed_space_equals_one_around_zero(
  kind, least_recall, tmp_path
):
  # At 1,000 times the spread from zero, float32 products have no correct digit.
  embeddings = np.round(_embeddings() * 2**10) / 2**10 + np.float32(4096.0)
  index = faiss_index.build_index(embeddings, kind)
  assert faiss_index.measure_index(index, embeddings)["recall_at_10"] >= least_recall
  faiss_index.write_index(str(tmp_path), index, {"kind": "as FAISS reads it"})
  kept = StoredIndex(str(tmp_path))
  assert (kept._index.ntotal, kept._index.d) == (2_000, 16)
  _, read = kept._index.search(embeddings[:50], 10)
  np.testing.assert_array_equal(read, index.search(embeddings[:50], 10)[1])


def test_index_around_zero_is_the_faiss_index_of_its_type():
  index = faiss_index.build_index(_embeddings() - _embeddings().mean(axis=0), "hnsw")
  assert type(index).__name__ == "IndexHNSWFlat"


def test_results_are_padded_if_cells_have_too_few_items(tmp_path):
  embeddings = _embeddings(80)
  index = faiss_index.build_index(embeddings, "ivf_flat")
  faiss_index.write_index(str(tmp_path), index, {"kind": "ivf_flat"})
  kept = StoredIndex(str(tmp_path))
  faiss.extract_index_ivf(kept._index).nprobe = 1
  found = kept.nearest(embeddings[:3], embeddings, num_neighbours=80)
  assert (found.indices[:, -1] == -1).all()
  assert np.isinf(found.distances[found.indices < 0]).all()
  assert np.isfinite(found.distances[found.indices >= 0]).all()


@pytest.mark.parametrize(
  ("num_items", "kind"),
  [(20_000, "flat"), (20_001, "ivf_flat"), (999_999, "ivf_flat"), (10**6, "ivf_pq")],
)
def test_default_index_type_depends_on_the_number_of_items(num_items, kind):
  assert faiss_index.choose_kind(num_items) == kind


@pytest.mark.parametrize(("num_items", "kind"), [(30, "ivf_flat"), (38, "ivf_pq")])
def test_too_few_items_for_cells_are_refused(num_items, kind):
  with pytest.raises(UserError, match="too few"):
    faiss_index.build_index(_embeddings(num_items), kind)


def test_unknown_index_type_is_refused():
  with pytest.raises(UserError, match="'tree'"):
    faiss_index.build_index(_embeddings(30), "tree")


@pytest.fixture
def folder(tmp_path):
  faiss_index.write_index(
    str(tmp_path), faiss_index.build_index(_embeddings(50), "flat"), {}
  )
  return tmp_path


def test_flipped_byte_is_detected(folder):
  content = bytearray((folder / "index.faiss").read_bytes())
  content[100] ^= 1
  (folder / "index.faiss").write_bytes(content)
  with pytest.raises(UserError, match=r"is not the index that manifest\.json"):
    StoredIndex(str(folder))


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"num_items": 3})])
def test_empty_manifest_is_refused(folder, content):
  (folder / "manifest.json").write_text(content)
  with pytest.raises(UserError, match="run --mode=index first"):
    StoredIndex(str(folder))


def test_k_above_the_number_of_items_is_refused(folder):
  with pytest.raises(UserError, match="num_neighbours=51 exceeds the gallery size 50"):
    StoredIndex(str(folder)).nearest(_embeddings(2), _embeddings(50), num_neighbours=51)


def test_queries_of_different_dimensions_are_refused(folder):
  with pytest.raises(UserError, match=r"8 dimensions .* 16"):
    StoredIndex(str(folder)).nearest(
      _embeddings(2, 8), _embeddings(50), num_neighbours=1
    )
