"""The writer: goes on after a kill, keeps others out, leaves out what is wanted."""

from __future__ import annotations

import fcntl
import os

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import paths, summary, writer
from trainer.data.prepare import Preparer
from trainer.data.records import RecordIndex
from trainer.data.sources import Item, ItemLoader
from trainer.errors import UserError

_NUM_ITEMS = 900


def _items():
  return [
    Item(
      f"key {n}", f"class {n % 7}", features={"vector": [float(n), 0.5], "number": n}
    )
    for n in range(_NUM_ITEMS)
  ]


def _writer(**options):
  preparer = Preparer(max_pixels=10_000)
  return writer.RecordWriter(preparer, records_per_shard=50, **options)


def _files(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != "manifest.json"  # It has the times.
  }


def _loaders(loaded, stop_at=None):
  def load(number, item):
    if number == stop_at:
      raise KeyboardInterrupt
    loaded.append(number)
    return item

  return [lambda n=n, i=i: load(n, i) for n, i in enumerate(_items())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  _writer().write(_loaders([]), str(folder), {"source": "a"})
  return _files(folder)


@pytest.mark.parametrize("stop_at", [0, 49, 50, 333, 899])
def test_an_ingest_stopped_anywhere_goes_on_to_the_same_result(
  tmp_path, whole, stop_at
):
  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([], stop_at), str(tmp_path), {"source": "a"})
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert min(loaded) == stop_at // 50 * 50


@pytest.mark.parametrize("stop_at", [1, 10, 20])
def test_an_ingest_stopped_while_it_is_published_goes_on(
  tmp_path, whole, monkeypatch, stop_at
):
  moves = []

  def stop(source, target):
    moves.append(target)
    if len([m for m in moves if m.endswith(".tfrecord")]) == stop_at:
      raise KeyboardInterrupt
    os.replace(source, target)

  if stop_at == 20:  # After all shards, before the index.
    monkeypatch.setattr(
      writer.index_builder, "publish_index", lambda *_: stop_it_there()
    )
  else:
    monkeypatch.setattr(paths, "move", stop)

  def stop_it_there():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([]), str(tmp_path), {"source": "a"})
  monkeypatch.undo()
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert loaded == []


def test_what_another_source_left_is_not_gone_on_from(tmp_path, whole):
  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([], 333), str(tmp_path), {"source": "b"})
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert len(loaded) == _NUM_ITEMS


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path, whole):
  _writer(num_threads=5).write(_loaders([]), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole


def test_the_second_process_is_told(tmp_path):
  descriptor = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  with pytest.raises(UserError, match="Another process is ingesting into"):
    _writer().write(_loaders([]), str(tmp_path), {})
  os.close(descriptor)
  _writer().write(_loaders([]), str(tmp_path), {})
  assert RecordIndex.open(str(tmp_path)).num_records == _NUM_ITEMS


def test_further_features_are_in_the_records(tmp_path):
  _writer().write(_loaders([]), str(tmp_path), {})
  [record] = RecordIndex.open(str(tmp_path)).read([7])
  features = tf.train.Example.FromString(record).features.feature
  assert features["vector"].float_list.value == [7.0, 0.5]
  assert features["number"].int64_list.value == [7]
  assert features["key"].bytes_list.value == [b"key 7"]
  assert "image" not in features


def test_unreadable_items_are_left_out_and_named_if_wanted(tmp_path, caplog):
  items = _items()[:100]
  items[3] = Item("bad one", "class 3", image=b"no image")
  parts = _writer(leave_out_unreadable=True).write(
    map(ItemLoader, items), str(tmp_path), {}
  )
  written = summary.of_parts(parts)
  assert written.num_records == RecordIndex.open(str(tmp_path)).num_records == 99
  assert "bad one is no image" in written.warnings()[0]
  assert "bad one is no image" in caplog.text


def test_duplicates_are_found_by_content_those_of_other_classes_first(tmp_path):
  items = [
    Item(f"key {n}", f"class {n % 3}", features={"text": str(n % 10)})
    for n in range(12)
  ]
  items.append(Item("again", "class 2", features={"text": "2"}))
  written = summary.of_parts(_writer().write(map(ItemLoader, items), str(tmp_path), {}))
  assert written.num_duplicates == 3
  assert written.num_duplicates_of_other_class == 2
  assert written.duplicates[0] == ("key 0", "key 10")
  assert (
    "3 records have the content of an earlier one, 2 of them" in (written.warnings()[0])
  )


def test_a_summary_says_the_ends_of_the_sizes(tmp_path):
  items = [Item(str(n), "ab"[n > 1], features={"x": n}) for n in range(7)]
  written = summary.of_parts(_writer().write(map(ItemLoader, items), str(tmp_path), {}))
  line = "7 records of 2 classes, from 2 (a) to 5 (b) a class."
  assert written.line() == line
  assert summary.of_index(RecordIndex.open(str(tmp_path))).line() == line
  summary.write(str(tmp_path), written)
  assert '"num_records": 7' in (tmp_path / "index" / "summary.json").read_text()


def test_vectors_are_kept_to_the_bit(tmp_path):
  vector = np.random.default_rng(0).normal(size=17).astype(np.float32)
  items = [Item(str(n), str(n % 2), features={"vector": vector * n}) for n in range(4)]
  _writer().write(map(ItemLoader, items), str(tmp_path), {})
  [record] = RecordIndex.open(str(tmp_path)).read([3])
  values = tf.train.Example.FromString(record).features.feature["vector"].float_list
  np.testing.assert_array_equal(np.float32(values.value), vector * 3)
