"""Indexing TFRecords in place: correct, incremental, with exact damage reports."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data import indexing, tfrecord
from trainer.data.indexing import ExistingTFRecords, index_records
from trainer.data.records import RecordIndex
from trainer.errors import UserError
from trainer.runtime import lease


def _example(**features):
  def feature(value):
    if isinstance(value, bytes):
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, float):
      return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    values = value if isinstance(value, list) else [value]
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

  named = {name: feature(value) for name, value in features.items()}
  return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


def _write(path, records):
  with tf.io.TFRecordWriter(str(path)) as file:
    for record in records:
      file.write(record)


def _labelled(labels, first=0):
  return [
    _example(y=label, blob=os.urandom(1 + (first + n) % 40), number=first + n)
    for n, label in enumerate(labels)
  ]


@pytest.fixture
def folder(tmp_path):
  """Three shards of a user, with labels in a custom feature."""
  rng = np.random.default_rng(0)
  for shard in range(3):
    labels = [b"class %d" % n for n in rng.integers(0, 5, 20 + shard)]
    _write(tmp_path / f"part {shard}.tfrecord", _labelled(labels, 100 * shard))
  return tmp_path


def _feature(record, name):
  feature = tf.train.Example.FromString(record).features.feature[name]
  return (feature.bytes_list.value or feature.int64_list.value)[0]


def test_shards_are_indexed_in_place(folder):
  before = {path: path.stat().st_mtime_ns for path in folder.glob("*.tfrecord")}
  index = index_records(str(folder), label_feature="y")
  records = index.read(np.arange(index.num_records))
  shards = sorted(map(str, folder.glob("*.tfrecord")))
  assert records == [record.numpy() for record in tf.data.TFRecordDataset(shards)]
  labels = [_feature(record, "y").decode() for record in records]
  assert [index.class_names[label] for label in index.labels] == labels
  assert list(index.class_names) == sorted(set(labels))
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_pattern_selects_the_shards(folder):
  (folder / "part 2.tfrecord").rename(folder / "other-2.rec")
  _write(folder / "other-1.rec", _labelled([b"x", b"y"]))
  index = index_records(str(folder / "other-*"), label_feature="y")
  assert [shard.name for shard in index.manifest.shards] == [
    "other-1.rec",
    "other-2.rec",
  ]
  again = index_records(str(folder / "other-*"), label_feature="y")
  assert again.num_records == index.num_records == 24


def test_the_mode_ingest_indexes_in_place(folder, caplog):
  caplog.set_level("INFO", logger="absl")
  ingest(source=ExistingTFRecords(label_feature="y"), folder=str(folder))
  assert RecordIndex.open(str(folder)).num_records == 63
  assert "63 records of 5 classes" in caplog.text


def test_integer_labels_are_class_names_in_digits(tmp_path):
  _write(tmp_path / "a.tfrecord", _labelled([7, -3, 7]))
  index = index_records(str(tmp_path), label_feature="y")
  assert list(index.class_names) == ["-3", "7"]
  assert index.labels.tolist() == [1, 0, 1]


def test_new_shards_are_added_without_reading_old_ones(folder, monkeypatch):
  old = index_records(str(folder), label_feature="y")
  names = list(old.class_names)
  _write(folder / "a first.tfrecord", _labelled([b"class 3", b"a new", b"class 1"]))
  scanned = []
  true_scan = indexing.scan_shard
  monkeypatch.setattr(
    indexing, "scan_shard", lambda *a: scanned.append(a[1]) or true_scan(*a)
  )
  index = index_records(str(folder), label_feature="y")
  assert scanned == ["a first.tfrecord"]
  assert list(index.class_names) == [*names, "a new"]
  np.testing.assert_array_equal(index.labels[:63], old.labels)
  numbers = [_feature(record, "number") for record in index.read([0, 62, 63, 65])]
  assert numbers == [0, 221, 0, 2]
  for class_id in range(index.num_classes):
    assert (index.labels[index.members(class_id)] == class_id).all()


def test_complete_index_is_not_rebuilt(folder, monkeypatch):
  index_records(str(folder), label_feature="y")
  monkeypatch.setattr(indexing, "write_index", None)
  assert index_records(str(folder), label_feature="y").num_records == 63


def test_changed_shard_is_named_and_all_shards_are_indexed_again(folder, caplog):
  index_records(str(folder), label_feature="y")
  _write(folder / "part 1.tfrecord", _labelled([b"z"] * 9))
  assert index_records(str(folder), label_feature="y").num_records == 51
  assert "part 1.tfrecord has" in caplog.text
  assert "when it was indexed" in caplog.text


def test_missing_shard_is_named_and_all_shards_are_indexed_again(folder, caplog):
  index_records(str(folder), label_feature="y")
  (folder / "part 0.tfrecord").unlink()
  assert index_records(str(folder), label_feature="y").num_records == 43
  assert "part 0.tfrecord is in the index but can't be read" in caplog.text


def test_copy_with_another_modification_time_is_unchanged(folder):
  index_records(str(folder), label_feature="y")
  os.utime(folder / "part 1.tfrecord", (1, 1))
  assert RecordIndex.open(str(folder)).num_records == 63


def test_changed_bytes_of_the_same_size_are_detected(folder):
  _write(folder / "part 1.tfrecord", [_example(y=b"aa"), _example(y=b"bb")] * 500)
  index_records(str(folder), label_feature="y")
  _write(folder / "part 1.tfrecord", [_example(y=b"bb"), _example(y=b"aa")] * 500)
  os.utime(folder / "part 1.tfrecord", (1, 1))
  with pytest.raises(UserError, match=r"part 1\.tfrecord has other bytes than when"):
    RecordIndex.open(str(folder))


def test_readers_of_the_old_index_continue(folder):
  old = index_records(str(folder), label_feature="y")
  labels = np.array(old.labels)
  _write(folder / "more.tfrecord", _labelled([b"a"] * 500))
  index_records(str(folder), label_feature="y")
  np.testing.assert_array_equal(old.labels, labels)
  assert len(old.read(np.arange(63))) == 63


def test_an_empty_shard_has_no_records(folder):
  _write(folder / "empty.tfrecord", [])
  assert index_records(str(folder), label_feature="y").num_records == 63


def test_truncated_shard_is_named(folder):
  path = folder / "part 2.tfrecord"
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(UserError, match=r"part 2\.tfrecord: record 21 is truncated"):
    index_records(str(folder), label_feature="y")
  assert not (folder / "index").exists()


@pytest.mark.parametrize(("position", "damage"), [(3, "length"), (-7, "data")])
def test_a_flipped_byte_is_named(folder, position, damage):
  path = folder / "part 1.tfrecord"
  content = bytearray(path.read_bytes())
  content[position] ^= 4
  path.write_bytes(content)
  number = 0 if damage == "length" else 20
  with pytest.raises(
    UserError, match=rf"part 1\.tfrecord: record {number} has .*corrupt {damage}"
  ):
    index_records(str(folder), label_feature="y")


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (_example(blob=b"x"), "has no feature 'y'; it has blob"),
    (_example(y=1.5), "has a label of type float_list in 'y'; it must be bytes or"),
    (_example(y=[1, 2]), "has 2 labels in 'y'; it must have one"),
    (_example(y=3), "has a label of another type than earlier records"),
    (b"\xff\xff", r"is not a tf\.train\.Example"),
  ],
)
def test_record_without_the_label_feature_is_named(folder, record, message):
  _write(folder / "part 1.tfrecord", [*_labelled([b"a", b"b"]), record])
  with pytest.raises(UserError, match=rf"part 1\.tfrecord: record 2 {message}"):
    index_records(str(folder), label_feature="y")


def test_a_first_record_without_a_label_is_named(folder):
  with pytest.raises(
    UserError, match=r"record 0 has no feature 'label'; it has blob, n"
  ):
    index_records(str(folder), label_feature="label")


def test_non_text_label_is_named(folder):
  _write(folder / "part 1.tfrecord", [_example(y=b"\xff\xfe")])
  with pytest.raises(UserError, match=r"part 1\.tfrecord has a label .* not UTF-8"):
    index_records(str(folder), label_feature="y")


def test_one_class_is_refused(tmp_path):
  _write(tmp_path / "a.tfrecord", _labelled([b"only"] * 4))
  with pytest.raises(UserError, match=r"has 1 class \(only\)"):
    index_records(str(tmp_path), label_feature="y")


def test_a_folder_without_shards_is_refused(tmp_path):
  with pytest.raises(
    UserError, match="has no shards; give a folder with files that end"
  ):
    index_records(str(tmp_path), label_feature="y")


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(UserError, match="gone can't be read: No such file"):
    index_records(str(tmp_path / "gone"), label_feature="y")


def test_second_indexing_process_is_refused(folder):
  with (
    lease.locked_folder(str(folder), "indexing"),
    pytest.raises(UserError, match=f"process {os.getpid()} of .* is indexing"),
  ):
    index_records(str(folder), label_feature="y")


def test_old_index_remains_until_the_new_one_is_complete(folder, monkeypatch):
  old = index_records(str(folder), label_feature="y").num_records
  _write(folder / "more.tfrecord", _labelled([b"a"] * 5))
  true_replace = os.replace

  def stop(source, target):
    if source.endswith("index.partial"):
      raise KeyboardInterrupt
    true_replace(source, target)

  monkeypatch.setattr(os, "replace", stop)
  with pytest.raises(KeyboardInterrupt):
    index_records(str(folder), label_feature="y")
  monkeypatch.undo()
  assert (folder / "index" / "labels.npy").exists()
  assert not (folder / "index.old").exists()
  assert index_records(str(folder), label_feature="y").num_records == old + 5


def test_pattern_in_a_folder_with_brackets_selects_its_shards(folder):
  (folder / "set[1]").mkdir()
  (folder / "set1").mkdir()
  _write(folder / "set[1]" / "a-1", _labelled([b"x", b"y"]))
  _write(folder / "set1" / "a-2", _labelled([b"x", b"y"]))
  index = index_records(str(folder / "set[1]" / "a-*"), label_feature="y")
  assert [shard.name for shard in index.manifest.shards] == ["a-1"]


def test_labels_changed_outside_the_sampled_bytes_are_read_again(folder, monkeypatch):
  monkeypatch.setattr("trainer.data.manifest._NUM_SAMPLES", 2)
  path = folder / "part 1.tfrecord"
  around = [_example(y=b"class 0", blob=b"x" * 5000)]
  _write(path, [*around, _example(y=b"class 1"), *around])
  before = index_records(str(folder), label_feature="y")
  _write(path, [*around, _example(y=b"class 2"), *around])
  os.utime(path, (1, 1))
  index = index_records(str(folder), label_feature="y")
  assert index.class_names[before.labels[21]] == "class 1"
  assert index.class_names[index.labels[21]] == "class 2"
  np.testing.assert_array_equal(
    np.delete(index.labels, 21), np.delete(before.labels, 21)
  )


def test_only_a_shard_with_another_time_is_read_again(folder, monkeypatch):
  before = index_records(str(folder), label_feature="y")
  os.utime(folder / "part 1.tfrecord", (1, 1))
  scanned = []
  true_scan = indexing.scan_shard
  monkeypatch.setattr(
    indexing, "scan_shard", lambda *a: scanned.append(a[1]) or true_scan(*a)
  )
  for _ in range(2):
    index = index_records(str(folder), label_feature="y")
  assert scanned == ["part 1.tfrecord"]
  np.testing.assert_array_equal(index.labels, before.labels)
  np.testing.assert_array_equal(index.arrays.offsets, before.arrays.offsets)


def _forged(num_bytes):
  length = struct.pack("<Q", num_bytes)
  return length + struct.pack("<I", tfrecord.masked_crc(length)) + b"1234"


@pytest.mark.parametrize("num_bytes", [1, 2**45, 2**64 - 1])
def test_a_forged_length_is_named(folder, num_bytes):
  with (folder / "part 1.tfrecord").open("ab") as file:
    file.write(_forged(num_bytes))
  with pytest.raises(UserError, match=r"part 1\.tfrecord: record 21 is truncated"):
    index_records(str(folder), label_feature="y")


def test_large_records_are_scanned_in_small_batches(folder, monkeypatch):
  expected = index_records(str(folder), label_feature="y")
  os.utime(folder / "part 1.tfrecord", (1, 1))
  monkeypatch.setattr(indexing, "_BATCH_BYTES", 100)
  monkeypatch.setattr(tfrecord, "_CHUNK_BYTES", 50)
  sizes = []
  true_numbers_of = indexing.LabelMapping.numbers_of
  monkeypatch.setattr(
    indexing.LabelMapping,
    "numbers_of",
    lambda self, names: sizes.append(len(names)) or true_numbers_of(self, names),
  )
  index = index_records(str(folder), label_feature="y")
  assert sum(sizes) == 21
  assert max(sizes) <= 4
  np.testing.assert_array_equal(index.labels, expected.labels)


@pytest.mark.parametrize("method", ["GZIP", "ZLIB"])
def test_compressed_shard_is_distinguished_from_a_damaged_one(tmp_path, method):
  path = str(tmp_path / "a.tfrecord")
  options = tf.io.TFRecordOptions(compression_type=method)
  with tf.io.TFRecordWriter(path, options) as file:
    for record in _labelled([b"x", b"y"] * 9):
      file.write(record)
  with pytest.raises(
    UserError, match=rf"a\.tfrecord is compressed \({method}\).* decompress the file"
  ):
    index_records(str(tmp_path), label_feature="y")


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ([b"a", b"b", b""], r"s\.tfrecord: record 2 has an empty label"),
    ([1, 2, [3, 4]], r"s\.tfrecord: record 2 has 2 labels in 'y'"),
    ([1, 2, []], r"s\.tfrecord: record 2 has 0 labels in 'y'"),
    ([1, 2, 2.5], r"s\.tfrecord: record 2 has a label of type float_list"),
  ],
)
def test_record_without_exactly_one_label_is_named(tmp_path, labels, message):
  _write(tmp_path / "s.tfrecord", [_example(y=label) for label in labels])
  with pytest.raises(UserError, match=message):
    index_records(str(tmp_path), label_feature="y")


def test_64_bit_labels_are_distinguished(tmp_path):
  labels = [2**63 - 1, 2**63 - 2, -(2**63), 2**53, 2**53 + 1]
  _write(tmp_path / "s.tfrecord", [_example(y=label) for label in labels])
  index = index_records(str(tmp_path), label_feature="y")
  assert [index.class_names[n] for n in index.labels] == [str(n) for n in labels]
