"""The writer: resuming after a kill, locking and exclusion of items."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import indexing, ingestion, manifest, shards
from trainer.data.example_encoder import ExampleEncoder
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Item, ItemLoader
from trainer.errors import UserError
from trainer.runtime import filesystem, lease

_NUM_ITEMS = 900


def _items():
  return [
    Item(
      f"key {n}", f"class {n % 7}", features={"vector": [float(n), 0.5], "number": n}
    )
    for n in range(_NUM_ITEMS)
  ]


def _writer(**options):
  encoder = ExampleEncoder(max_pixels=10_000)
  return ingestion.RecordWriter(encoder, records_per_shard=50, **options)


def _files(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != "manifest.json"  # It contains times.
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
def test_interrupted_ingest_resumes_to_the_same_result(tmp_path, whole, stop_at):
  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([], stop_at), str(tmp_path), {"source": "a"})
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert min(loaded) == stop_at // 50 * 50


@pytest.mark.parametrize("stop_at", [1, 10, 20])
def test_ingest_interrupted_while_publishing_resumes(
  tmp_path, whole, monkeypatch, stop_at
):
  moves = []

  def stop(source, target):
    moves.append(target)
    if len([m for m in moves if m.endswith(".tfrecord")]) == stop_at:
      raise KeyboardInterrupt
    os.replace(source, target)

  if stop_at == 20:  # After all shards, before the index.
    monkeypatch.setattr(shards.indexing, "publish_index", lambda *_: stop_it_there())
  else:
    monkeypatch.setattr(filesystem, "move", stop)

  def stop_it_there():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([]), str(tmp_path), {"source": "a"})
  monkeypatch.undo()
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert loaded == []


def test_partial_ingest_of_another_source_is_not_resumed(tmp_path, whole):
  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([], 333), str(tmp_path), {"source": "b"})
  loaded: list[int] = []
  _writer().write(_loaders(loaded), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole
  assert len(loaded) == _NUM_ITEMS


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path, whole):
  _writer(num_threads=5).write(_loaders([]), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole


def test_second_ingest_process_is_refused(tmp_path):
  with (
    lease.locked_folder(str(tmp_path), "ingesting into"),
    pytest.raises(UserError, match=f"process {os.getpid()} of .* is ingesting into"),
  ):
    _writer().write(_loaders([]), str(tmp_path), {})
  _writer().write(_loaders([]), str(tmp_path), {})
  assert RecordIndex.open(str(tmp_path)).num_records == _NUM_ITEMS


def test_additional_features_are_in_the_records(tmp_path):
  _writer().write(_loaders([]), str(tmp_path), {})
  [record] = RecordIndex.open(str(tmp_path)).read([7])
  features = tf.train.Example.FromString(record).features.feature
  assert features["vector"].float_list.value == [7.0, 0.5]
  assert features["number"].int64_list.value == [7]
  assert features["key"].bytes_list.value == [b"key 7"]
  assert "image" not in features


def test_unreadable_items_are_skipped_and_named_on_request(tmp_path, caplog):
  items = _items()[:100]
  items[3] = Item("bad one", "class 3", image=b"no image")
  parts = _writer(leave_out_unreadable=True).write(
    map(ItemLoader, items), str(tmp_path), {}
  )
  written = shards.summary_of_parts(parts)
  assert written.num_records == RecordIndex.open(str(tmp_path)).num_records == 99
  assert "bad one can't be decoded as an image" in written.warnings()[0]
  assert "bad one can't be decoded as an image" in caplog.text


def test_duplicates_are_found_by_content_across_classes_first(tmp_path):
  items = [
    Item(f"key {n}", f"class {n % 3}", features={"text": str(n % 10)})
    for n in range(12)
  ]
  items.append(Item("again", "class 2", features={"text": "2"}))
  written = shards.summary_of_parts(
    _writer().write(map(ItemLoader, items), str(tmp_path), {})
  )
  assert written.num_duplicates == 3
  assert written.num_duplicates_of_other_class == 2
  assert written.duplicates[0] == ("key 0", "key 10")
  assert (
    "3 records have the content of an earlier one, 2 of them" in (written.warnings()[0])
  )


def test_summary_has_the_range_of_sizes(tmp_path):
  items = [Item(str(n), "ab"[n > 1], features={"x": n}) for n in range(7)]
  written = shards.summary_of_parts(
    _writer().write(map(ItemLoader, items), str(tmp_path), {})
  )
  line = "7 records of 2 classes, 2 (a) to 5 (b) per class."
  assert written.line() == line
  assert shards.summary_of_index(RecordIndex.open(str(tmp_path))).line() == line
  assert '"num_records": 7' in (tmp_path / "index" / "summary.json").read_text()


def test_vectors_are_kept_bit_for_bit(tmp_path):
  vector = np.random.default_rng(0).normal(size=17).astype(np.float32)
  items = [Item(str(n), str(n % 2), features={"vector": vector * n}) for n in range(4)]
  _writer().write(map(ItemLoader, items), str(tmp_path), {})
  [record] = RecordIndex.open(str(tmp_path)).read([3])
  values = tf.train.Example.FromString(record).features.feature["vector"].float_list
  np.testing.assert_array_equal(np.float32(values.value), vector * 3)


def test_user_files_are_not_overwritten(tmp_path):
  (tmp_path / "records-00000.tfrecord").write_bytes(b"mine")
  loaded: list[int] = []
  with pytest.raises(UserError, match=r"records-00000\.tfrecord already exists"):
    _writer().write(_loaders(loaded), str(tmp_path), {})
  assert (tmp_path / "records-00000.tfrecord").read_bytes() == b"mine"
  assert loaded == []


def test_shards_indexed_in_place_are_not_overwritten(tmp_path, whole):
  shard = tmp_path / "records-00000.tfrecord"
  shard.write_bytes(whole[shard.relative_to(tmp_path)])
  indexing.index_records(str(tmp_path), label_feature="label")
  with pytest.raises(UserError, match=r"records-00000\.tfrecord already exists"):
    _writer().write(_loaders([]), str(tmp_path), {})
  assert shard.read_bytes() == whole[shard.relative_to(tmp_path)]


def test_user_file_at_a_later_shard_name_is_kept(tmp_path):
  (tmp_path / "records-00003.tfrecord").write_bytes(b"mine")
  with pytest.raises(UserError, match=r"records-00003\.tfrecord already exists"):
    _writer().write(_loaders([]), str(tmp_path), {})
  assert [path.name for path in tmp_path.iterdir()] == ["records-00003.tfrecord"]


def test_an_ingest_replaces_its_own_shards(tmp_path, whole):
  for _ in range(2):
    _writer().write(_loaders([]), str(tmp_path), {"source": "a"})
  assert _files(tmp_path) == whole


def test_ingest_killed_while_replacing_its_shards_resumes(tmp_path, whole, monkeypatch):
  _writer().write(_loaders([]), str(tmp_path), {"source": "a"})

  def stop(source, target):
    if target.endswith("records-00004.tfrecord"):
      raise KeyboardInterrupt
    os.replace(source, target)

  monkeypatch.setattr(filesystem, "move", stop)
  with pytest.raises(KeyboardInterrupt):
    _writer().write(_loaders([]), str(tmp_path), {"source": "a"})
  monkeypatch.undo()
  assert manifest.read(str(tmp_path / "index")) is None
  _writer().write(_loaders([]), str(tmp_path), {"source": "b"})
  assert _files(tmp_path) == whole


def test_folders_with_brackets_in_their_names_are_supported(tmp_path):
  for number in (1, 2):
    (tmp_path / f"set[{number}]").mkdir()
    _writer().write(_loaders([]), str(tmp_path / f"set[{number}]"), {"number": number})
  for number in (1, 2):
    index = RecordIndex.open(str(tmp_path / f"set[{number}]"))
    assert index.manifest.source == {"number": number}
  assert len(list(tmp_path.iterdir())) == 2


def test_pattern_is_refused_as_an_output_folder(tmp_path):
  with pytest.raises(UserError, match="is a pattern; records are written into a"):
    _writer().write(_loaders([]), str(tmp_path / "set-*"), {})
  assert list(tmp_path.iterdir()) == []


def test_set_aside_index_is_restored(tmp_path):
  (tmp_path / "index.old").mkdir()
  (tmp_path / "index.old" / "labels.npy").write_bytes(b"old")
  indexing.recover_index(str(tmp_path / "index"))
  assert (tmp_path / "index" / "labels.npy").read_bytes() == b"old"
  assert not (tmp_path / "index.old").exists()


def test_name_that_is_not_utf8_is_escaped_in_the_summary(tmp_path):
  items = [Item(f"k\udcff{n}", f"c{n % 2}", features={"x": 1}) for n in range(4)]
  _writer().write(map(ItemLoader, items), str(tmp_path), {"file": "\udcff"})
  text = (tmp_path / "index" / "summary.json").read_text()
  assert "k\\udcff0" in text


def test_a_failure_while_publishing_leaves_no_shard(tmp_path, monkeypatch):
  def fail(source, target):
    if os.path.dirname(target) == str(tmp_path) and target.endswith("3.tfrecord"):
      raise PermissionError(13, "Permission denied", target)
    os.replace(source, target)

  monkeypatch.setattr(filesystem, "move", fail)
  with pytest.raises(UserError, match="can't be written: Permission denied"):
    _writer().write(_loaders([]), str(tmp_path), {})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "error", [ValueError("odd"), tf.errors.InternalError(None, None, "odd")]
)
def test_every_failure_of_an_item_names_it(tmp_path, error):
  class Failing(ExampleEncoder):
    def __call__(self, item):
      raise error

  odd = ingestion.RecordWriter(Failing(max_pixels=1), records_per_shard=9)
  with pytest.raises(UserError, match="key 0 can't be stored: odd"):
    odd.write(map(ItemLoader, _items()), str(tmp_path), {})


def test_records_are_written_one_by_one(tmp_path, monkeypatch):
  sizes = []
  true_write = filesystem.write_parts

  def watched(path, parts):
    parts = list(parts) if path.endswith(".json.new") else parts
    true_write(path, (sizes.append(len(part)) or part for part in parts))

  monkeypatch.setattr(filesystem, "write_parts", watched)
  _writer().write(_loaders([]), str(tmp_path), {})
  lengths = RecordIndex.open(str(tmp_path)).arrays.lengths
  assert set(lengths + 16) <= set(sizes)
  assert len(sizes) > _NUM_ITEMS
