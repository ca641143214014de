"""Listed triplets: reading, validation and sampling."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from trainer.data import ingestion
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Item, encode_png
from trainer.data.triplet_sampler import TripletSampler
from trainer.errors import UserError

_IMAGE = encode_png(np.zeros((2, 2), np.uint8))
_NUM_RECORDS, _NUM_CLASSES = 24, 6


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  """Records n with key "n.png" and class n % 6."""
  folder = str(tmp_path_factory.mktemp("records"))
  items = [
    Item(f"{n}.png", f"class {n % _NUM_CLASSES}", _IMAGE) for n in range(_NUM_RECORDS)
  ]
  ingestion.write_records(items, folder, records_per_shard=9, fingerprint={})
  return RecordIndex.open(folder)


@pytest.fixture
def make(index, tmp_path):
  """Makes the sampler of a list, given as text or as an array."""

  def make(content, name="list.csv", **options):
    path = tmp_path / name
    if isinstance(content, str):
      path.write_text(content, encoding="utf-8")
    else:
      np.save(path, content)
    options = {"triplets_per_batch": 2, "seed": 3, **options}
    return TripletSampler(index, file=str(path), **options)

  return make


def _listed(num_triplets=10):
  """Returns distinct triplets whose positive has the class of the anchor."""
  anchors = np.arange(num_triplets)
  return np.stack([anchors, anchors + _NUM_CLASSES, anchors + 1], axis=1)


def _table(triplets, delimiter=","):
  rows = [
    "anchor,positive,negative,source",
    *(",".join([*(f"{number}.png" for number in row), "clicks"]) for row in triplets),
  ]
  return "\n".join(rows).replace(",", delimiter) + "\n"


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.npy"])
def test_each_triplet_is_drawn_once_per_epoch(make, name):
  listed = _listed()
  delimiter = "\t" if name.endswith("tsv") else ","
  content = listed if name.endswith("npy") else _table(listed, delimiter)
  sampler = make(content, name)
  assert sampler.shape == (2, 3)
  for epoch in range(3):
    drawn = sampler.batches(5 * epoch + np.arange(5)).reshape(-1, 3)
    np.testing.assert_array_equal(sorted(drawn.tolist()), listed)


def test_batch_is_a_pure_function_of_seed_and_step(make):
  one, again, other = (make(_listed(), "a.npy", seed=seed) for seed in (1, 1, 2))
  whole = one.batches(np.arange(20))
  np.testing.assert_array_equal(whole, again.batches(np.arange(20)))
  np.testing.assert_array_equal(whole[7], again.batch(7))
  assert (whole != other.batches(np.arange(20))).any()


def test_a_list_shorter_than_a_batch_is_repeated(make):
  sampler = make(_listed(3), "a.npy", triplets_per_batch=8)
  counts = np.bincount(sampler.batch(0)[:, 0])
  assert sorted(counts) == [2, 3, 3]


def test_triplets_outside_the_training_classes_are_never_drawn(make, index):
  sampler = make(_listed(), "a.npy", classes=np.array([0, 1, 2], np.int32))
  drawn = sampler.batches(np.arange(30))
  assert (index.labels[drawn] < 3).all()
  assert sampler.num_triplets == 4  # Anchors of the classes 0 and 1, twice each.


_BAD = {
  "a record that does not exist": [1, 7, 99],
  "a negative of the anchor's own class": [1, 7, 13],
  "the same record as anchor and positive": [1, 1, 2],
  "the same record as positive and negative": [1, 8, 8],
}


@pytest.mark.parametrize("as_keys", [True, False])
@pytest.mark.parametrize("reason", _BAD)
def test_bad_triplets_are_counted_and_refused_or_skipped(make, reason, as_keys):
  listed = np.concatenate([_listed(4), [_BAD[reason]], _listed(2), [_BAD[reason]]])
  make_it = functools.partial(
    make, _table(listed) if as_keys else listed, "a.csv" if as_keys else "a.npy"
  )
  with pytest.raises(UserError, match=f"2 of 8 triplets have {reason}.*triplet 5;"):
    make_it()
  assert make_it(bad_triplets="leave_out").num_triplets == 6


@pytest.mark.parametrize(
  ("listed", "classes", "why"),
  [
    ([[1, 1, 2]], None, "it is empty, or all triplets were skipped"),
    ([[1, 7, 2]], [3, 4], "1 triplets are of classes outside the training split"),
  ],
)
def test_list_without_usable_triplets_is_refused_with_the_reason(
  make, listed, classes, why
):
  with pytest.raises(UserError, match=why):
    make(listed, "a.npy", bad_triplets="leave_out", classes=classes)


def test_positive_may_have_another_class(make):
  assert make([[0, 3, 1]], "a.npy").num_triplets == 1


@pytest.mark.parametrize(
  ("content", "name", "message"),
  [
    ("anchor,positive\na,b\n", "a.csv", "no column 'negative'"),
    ("anchor,positive,negative\n0.png,1.png\n", "a.csv", "line 2 lacks a key"),
    ('anchor,positive,negative\n"0.png,1', "a.csv", "after line"),
    ("anchor,positive,negative\n", "a.csv", "no triplet to train on: it is empty"),
    ("not an array", "a.npy", "is not an array"),
    (np.zeros((3, 2), int), "a.npy", r"shape \(3, 2\)"),
    (np.zeros((3, 3)), "a.npy", "type float64"),
    (np.array([["x"] * 3], object), "a.npy", "is not an array"),
  ],
)
def test_invalid_list_is_refused(make, content, name, message):
  with pytest.raises(UserError, match=message):
    make(content, name)


def test_several_arrays_are_refused(index, tmp_path):
  np.savez(tmp_path / "list", one=np.zeros((3, 3), int))
  path = (tmp_path / "list.npz").rename(tmp_path / "list.npy")
  with pytest.raises(UserError, match="holds several arrays"):
    TripletSampler(index, file=str(path), triplets_per_batch=2, seed=1)


def test_missing_file_is_refused(index):
  with pytest.raises(UserError, match=r"nowhere\.csv can't be read"):
    TripletSampler(index, file="nowhere.csv", triplets_per_batch=2, seed=1)


def test_ambiguous_key_is_refused(tmp_path):
  items = [Item("same", str(n), _IMAGE) for n in range(3)]
  ingestion.write_records(items, str(tmp_path), records_per_shard=9, fingerprint={})
  path = tmp_path / "list.csv"
  path.write_text("anchor,positive,negative\nsame,same,same\n")
  with pytest.raises(UserError, match=r"'same' of .* belongs to two records"):
    TripletSampler(
      RecordIndex.open(str(tmp_path)), file=str(path), triplets_per_batch=1, seed=1
    )
