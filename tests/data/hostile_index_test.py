"""Untrusted indexes: no read outside the folder, no unvalidated allocation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trainer.data import ingestion
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Item
from trainer.errors import UserError

_NUM_RECORDS = 23


@pytest.fixture
def folder(tmp_path):
  """Shards of five records of three classes."""
  items = [
    Item(f"key {n}", ("a", "Ähre", "b 1")[n % 3], features={"number": n})
    for n in range(_NUM_RECORDS)
  ]
  ingestion.write_records(items, str(tmp_path), records_per_shard=5, fingerprint={})
  return tmp_path


def _change_manifest(folder, change):
  path = folder / "index" / "manifest.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize(
  "name", ["../x", "/etc/passwd", "a/../../b", "", ".", "a//b", "s3://b/c", "a\0"]
)
def test_a_manifest_whose_shard_is_outside_its_folder_is_refused(folder, name):
  _change_manifest(folder, lambda content: content["shards"][1].update(name=name))
  with pytest.raises(
    UserError, match=r"manifest\.json is damaged .*not inside the fold"
  ):
    RecordIndex.open(str(folder))


@pytest.mark.parametrize("count", [-1, 2**63, 1.5, "5", None, True])
def test_manifest_with_an_invalid_count_is_refused(folder, count):
  _change_manifest(folder, lambda content: content.update(num_classes=count))
  with pytest.raises(UserError, match=r"manifest\.json is damaged .* is not a count"):
    RecordIndex.open(str(folder))


def test_deeply_nested_manifest_is_refused(folder):
  (folder / "index" / "manifest.json").write_text("[" * 100_000)
  with pytest.raises(UserError, match=r"manifest\.json is damaged"):
    RecordIndex.open(str(folder))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("lengths", 2**32 - 1),
    ("offsets", -1),
    ("offsets", 2**62),
    ("shards", 99),
    ("shards", -1),
    ("labels", 3),
  ],
)
def test_record_outside_its_shard_is_refused_before_allocation(folder, name, value):
  path = folder / "index" / f"{name}.npy"
  array = np.load(path)
  array[7] = value
  np.save(path, array)
  index = RecordIndex.open(str(folder))
  assert len(index.read([6, 8])) == 2
  with pytest.raises(UserError, match="a record lies outside its shard, or has no cl"):
    index.read([6, 7, 8])


def test_record_number_out_of_range_is_refused(folder):
  index = RecordIndex.open(str(folder))
  for number in (-1, _NUM_RECORDS):
    with pytest.raises(UserError, match="is damaged"):
      index.read([number])


@pytest.mark.parametrize("name", ["member_starts", "name_starts"])
def test_decreasing_offsets_are_refused(folder, name):
  path = folder / "index" / f"{name}.npy"
  array = np.load(path)
  array[1] = array[-1] + 1
  np.save(path, array)
  with pytest.raises(
    UserError, match=rf"{name}\.npy of the index is damaged \(no ascending parts"
  ):
    RecordIndex.open(str(folder))


def test_class_name_that_is_not_utf8_is_refused(folder):
  path = folder / "index" / "name_text.npy"
  array = np.load(path)
  array[:] = 0xFF
  np.save(path, array)
  with pytest.raises(UserError, match=r"a class name .* is not UTF-8"):
    list(RecordIndex.open(str(folder)).class_names)


def test_pickled_array_is_refused(folder):
  path = folder / "index" / "labels.npy"
  np.save(path, np.array([{}] * _NUM_RECORDS, object), allow_pickle=True)
  with pytest.raises(UserError, match=r"labels\.npy of the index is damaged"):
    RecordIndex.open(str(folder))
