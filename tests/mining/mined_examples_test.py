"""Mined examples against loops from the definition."""

from __future__ import annotations

import errno
import os
import re
import tempfile

import numpy as np
import pytest

from tests.mining.corpora import Corpus, distances
from trainer.data.index_arrays import members_from_labels
from trainer.errors import UserError
from trainer.mining.corpus import (
  NearestItems,
  empty_neighbours,
  neighbours_on_disk,
)
from trainer.mining.mined_examples import (
  ExampleMining,
  MarginWindow,
  MislabelledFilter,
  Positives,
  RankWindow,
)

_SIZES = (14, 9, 1, 12, 7, 2, 15)


def _mine(corpus, window, kind="exact", items=None, **options):
  items = corpus.items() if items is None else items
  rows = items.record_numbers
  embeddings = corpus.embeddings[rows]
  return ExampleMining(window=window, **options).mine(
    embeddings, items, corpus.contents[rows], NearestItems(embeddings, kind)
  )


def _other_labels(corpus, anchor, by_distance):
  """Returns the valid negatives of an anchor, nearest first."""
  return [
    item
    for item in by_distance
    if corpus.labels[item] != corpus.labels[anchor]
    and corpus.contents[item] != corpus.contents[anchor]
  ]


def _lists(mined):
  def kept(row):
    assert (row[: (row >= 0).sum()] >= 0).all()  # Missing entries are at the end.
    return row[row >= 0].tolist()

  return {
    int(anchor): (kept(positives), kept(negatives))
    for anchor, positives, negatives in zip(
      mined.anchors, mined.positives, mined.negatives
    )
  }


@pytest.mark.parametrize("kind", ["exact", "flat"])
@pytest.mark.parametrize(("first", "last"), [(1, 4), (3, 9), (2, 40)])
def test_rank_window_contains_those_ranks_of_other_labels(first, last, kind):
  corpus = Corpus(_SIZES, num_copies=6)
  mined = _lists(_mine(corpus, RankWindow(first=first, last=last), kind))
  matrix = distances(corpus.embeddings)
  sizes = np.bincount(corpus.labels)
  assert mined
  for anchor in range(len(corpus.labels)):
    others = _other_labels(corpus, anchor, np.argsort(matrix[anchor], kind="stable"))
    expected = others[first - 1 : last]
    if sizes[corpus.labels[anchor]] == 1:
      assert anchor not in mined
    else:
      # Copies have equal distances, in either order.
      got = matrix[anchor][mined[anchor][1]]
      np.testing.assert_allclose(got, matrix[anchor][expected], rtol=1e-4)
      assert set(mined[anchor][1]) <= set(others)


def test_a_margin_window_is_between_the_farthest_positive_and_the_margin():
  corpus = Corpus(_SIZES, num_copies=4)
  margin, num_negatives = 0.5, 6
  options = {"positives": Positives(num_positives=2)}
  window = MarginWindow(margin=margin, num_negatives=num_negatives, depth=50)
  result = _mine(corpus, window, **options)
  mined, matrix = _lists(result), distances(corpus.embeddings)
  num_without = 0
  # Positives of all anchors, including excluded ones: the window has all negatives.
  every = _lists(_mine(corpus, RankWindow(first=1, last=50), **options))
  for anchor, (positives, _) in every.items():
    nearest = max(matrix[anchor][p] for p in positives)
    others = _other_labels(corpus, anchor, np.argsort(matrix[anchor], kind="stable"))
    inside = [n for n in others if nearest < matrix[anchor][n] < nearest + margin]
    if not inside:
      num_without += 1
      assert anchor not in mined
    else:
      assert mined[anchor] == (positives, inside[:num_negatives])
  assert 0 < num_without == result.counts["anchors_without_negative"]
  assert result.counts["anchors"] == len(mined) > 0


def _positives_of(corpus, anchor):
  is_other = np.arange(len(corpus.labels)) != anchor
  is_same = (corpus.labels == corpus.labels[anchor]) & is_other
  return np.flatnonzero(is_same & (corpus.contents != corpus.contents[anchor]))


@pytest.mark.parametrize("choice", ["hardest", "easiest", "random"])
def test_positives_have_the_class_of_the_anchor_and_are_not_copies(choice):
  corpus = Corpus(_SIZES, num_copies=8, seed=2)
  matrix = distances(corpus.embeddings)
  positives = Positives(num_positives=3, choice=choice)
  mined = _lists(_mine(corpus, RankWindow(first=1, last=3), positives=positives))
  for anchor, (got, _) in mined.items():
    allowed = _positives_of(corpus, anchor)
    sign = -1 if choice == "hardest" else 1
    in_order = allowed[np.argsort(sign * matrix[anchor][allowed], kind="stable")][:3]
    assert len(set(got)) == len(got) == len(in_order)
    assert set(got) <= set(allowed)
    if choice != "random":
      # Copies have equal distances, in either order.
      np.testing.assert_allclose(
        matrix[anchor][got], matrix[anchor][in_order], rtol=1e-5
      )


def test_random_positives_cycle_through_the_class():
  corpus = Corpus((12, 12))
  got = [
    _mine(corpus, RankWindow(first=1, last=2), items=corpus.items(key=key)).positives
    for key in range(80)
  ]
  counts = np.bincount(np.ravel(got), minlength=24)
  assert counts.sum() == 24 * 80
  assert counts.min() > 40
  assert counts.max() < 130


def _suspected_labels(corpus, q, share):
  matrix = distances(corpus.embeddings)
  found = []
  for item in range(len(corpus.labels)):
    nearest = [n for n in np.argsort(matrix[item], kind="stable") if n != item][:q]
    labels = [
      corpus.labels[n] for n in nearest if corpus.contents[n] != corpus.contents[item]
    ]
    others = [label for label in labels if label != corpus.labels[item]]
    if any(others.count(label) >= q * share for label in set(others)):
      found.append(item)
  return found


def test_suspected_label_errors_are_named_and_excluded():
  corpus = Corpus((20, 20, 20), spread=0.3, seed=4)
  for item in np.flatnonzero(corpus.labels == 1)[:2]:
    corpus.labels[item] = 0
  corpus.table = members_from_labels(corpus.labels, 3)
  expected = _suspected_labels(corpus, 5, 0.8)
  assert len(expected) >= 2
  mined = _mine(
    corpus,
    RankWindow(first=1, last=30),
    mislabelled=MislabelledFilter(num_neighbours=5, min_fraction=0.8),
  )
  assert mined.suspected_mislabelled.tolist() == expected
  assert mined.counts["suspected_mislabelled"] == len(expected)
  used = {*mined.anchors, *mined.positives.ravel(), *mined.negatives.ravel()}
  assert not used & set(expected)


def test_anchors_whose_neighbours_are_all_of_their_label_are_searched_again():
  corpus = Corpus((30, 12), spread=0.01, seed=1)
  mined = _mine(corpus, RankWindow(first=1, last=3))
  # 6 neighbours have the anchor's class; 24 exceed the smaller class.
  assert mined.counts["anchors_searched_again"] == 42
  assert mined.counts["anchors_without_negative"] == 30
  assert corpus.labels[mined.anchors].tolist() == [1] * 12
  assert (corpus.labels[mined.negatives] == 0).all()


def test_missing_negatives_are_reported_in_one_line():
  corpus = Corpus((40, 40), spread=0.01)
  with pytest.raises(
    UserError, match=r"none of 80 anchors has a negative among its 24"
  ):
    _mine(corpus, RankWindow(first=1, last=3))


def test_missing_positives_are_reported_in_one_line():
  corpus = Corpus((1, 1, 1))
  with pytest.raises(UserError, match="none of 3 items has a positive"):
    _mine(corpus, RankWindow(first=1, last=1))


def test_subset_of_classes_is_mined_separately():
  corpus = Corpus(_SIZES)
  items = corpus.items(np.array([0, 3, 4], np.int32), records_per_class=5)
  assert np.bincount(items.labels).tolist() == [5, 0, 0, 5, 5]
  mined = _mine(corpus, RankWindow(first=1, last=4), items=items)
  assert mined.counts["anchors"] == 15
  labels = items.labels[mined.negatives]
  assert (labels != items.labels[mined.anchors][:, None]).all()


def test_full_temporary_disk_is_reported_in_one_line(tmp_path, monkeypatch):
  def full(descriptor, offset, num_bytes):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  monkeypatch.setattr(os, "posix_fallocate", full)
  message = rf"{tmp_path} has no space for 4,000 bytes .*\(No space left on device\)"
  with pytest.raises(UserError, match=message), neighbours_on_disk(100, 5):
    pass


def test_disk_space_is_reserved_before_use(tmp_path, monkeypatch):
  file = (tmp_path / "neighbours").open("w+b")
  monkeypatch.setattr(tempfile, "TemporaryFile", lambda: file)
  with neighbours_on_disk(1000, 50) as found:
    assert found.indices.shape == found.distances.shape == (1000, 50)
    assert os.fstat(file.fileno()).st_blocks * 512 >= 8 * 1000 * 50


def test_search_by_codes_is_the_same_in_chunks(monkeypatch):
  nearest = NearestItems(Corpus((90,) * 8, seed=5).embeddings, "ivf_pq")
  items = np.arange(720)
  whole = nearest.search(items, 20, empty_neighbours(720, 20))
  monkeypatch.setattr("trainer.mining.corpus._MIN_QUERIES", 7)
  monkeypatch.setattr("trainer.mining.corpus._TABLE_BYTES", 1)
  parts = nearest.search(items, 20, empty_neighbours(720, 20))
  np.testing.assert_array_equal(whole.indices, parts.indices)


def test_a_search_by_codes_has_true_distances():
  corpus = Corpus((90,) * 8, seed=5)
  nearest = NearestItems(corpus.embeddings, "ivf_pq")
  items = np.arange(0, 720, 7)
  found = nearest.search(items, 20, empty_neighbours(len(items), 20))
  assert (found.indices != items[:, None]).all()
  is_there = found.indices >= 0
  true = distances(corpus.embeddings)[items[:, None], found.indices]
  np.testing.assert_allclose(found.distances[is_there], true[is_there], rtol=1e-5)
  assert (np.diff(np.where(is_there, found.distances, 1e9), axis=1) >= 0).all()


def test_search_by_codes_has_high_recall():
  corpus = Corpus((90,) * 8, seed=5)
  nearest = NearestItems(corpus.embeddings, "ivf_pq")
  found = nearest.search(np.arange(720), 20, empty_neighbours(720, 20))
  true = distances(corpus.embeddings)
  np.fill_diagonal(true, np.inf)
  exact = np.argsort(true, axis=1)[:, :20]
  shares = [len(np.intersect1d(*rows)) / 20 for rows in zip(found.indices, exact)]
  assert np.mean(shares) > 0.98


def test_small_corpora_use_exact_faiss_search_on_one_cpu(mirrored):
  embeddings = Corpus((4, 4)).embeddings
  assert NearestItems(embeddings, "auto").kind == "flat"
  with mirrored(2).scope():
    assert NearestItems(embeddings, "auto").kind == "exact"


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: RankWindow(first=0, last=3), "ranks 0 to 3 are empty"),
    (lambda: RankWindow(first=5, last=4), "ranks 5 to 4 are empty"),
    (lambda: MarginWindow(margin=0.0, num_negatives=1), "must be greater than 0"),
    (lambda: MarginWindow(margin=0.1, num_negatives=9, depth=8), "1 to depth=8"),
    (lambda: Positives(num_positives=0), "num_positives=0"),
    (lambda: Positives(choice="best"), "'best' must be one of random"),
    (lambda: MislabelledFilter(min_fraction=0.5), "at least 1 neighbour"),
    (
      lambda: NearestItems(np.zeros((2, 2)), "fast"),
      "'fast' must be one of auto, exact",
    ),
  ],
)
def test_invalid_options_are_refused(make, message):
  with pytest.raises(UserError, match=re.escape(message)):
    make()
