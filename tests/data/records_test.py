"""Records by number: equal to a sequential read, with damage reported."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import ingestion, tfrecord
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError

_NUM_RECORDS, _RECORDS_PER_SHARD = 23, 5
_NAMES = ("zebra", "Ähre", "apple 1")


def _item(number, label):
  image = np.random.default_rng(number).integers(0, 256, (4, 3)).astype(np.uint8)
  return Item(f"key {number}", label, encode_png(image))


@pytest.fixture
def folder(tmp_path):
  """Shards of five records; classes of unequal size, in no order."""
  labels = np.random.default_rng(3).choice(_NAMES, _NUM_RECORDS, p=(0.6, 0.3, 0.1))
  items = [_item(number, str(label)) for number, label in enumerate(labels)]
  ingestion.write_records(
    items, str(tmp_path), records_per_shard=_RECORDS_PER_SHARD, fingerprint={}
  )
  return tmp_path


def _plain_pass(folder):
  shards = sorted(str(path) for path in folder.glob("*.tfrecord"))
  return [record.numpy() for record in tf.data.TFRecordDataset(shards)]


def _label(record):
  example = tf.train.Example.FromString(record)
  return example.features.feature["label"].bytes_list.value[0].decode()


def _shard(folder, number):
  return folder / f"records-{number:05}.tfrecord"


def _flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 0x01
  path.write_bytes(content)


def test_records_equal_those_of_a_sequential_read(folder):
  index = RecordIndex.open(str(folder))
  expected = _plain_pass(folder)
  assert index.num_records == len(expected) == _NUM_RECORDS
  assert index.read(np.arange(_NUM_RECORDS)) == expected


def test_records_are_read_in_the_requested_order(folder):
  numbers = [22, 0, 7, 7, 13]
  expected = _plain_pass(folder)
  records = RecordIndex.open(str(folder)).read(numbers)
  assert records == [expected[number] for number in numbers]


def test_labels_and_names_are_those_of_the_records(folder):
  index = RecordIndex.open(str(folder))
  labels = [_label(record) for record in _plain_pass(folder)]
  assert list(index.class_names) == sorted(set(labels))
  assert [index.class_names[label] for label in index.labels] == labels


def test_members_are_the_records_of_a_class(folder):
  index = RecordIndex.open(str(folder))
  labels = [_label(record) for record in _plain_pass(folder)]
  for class_id, name in enumerate(index.class_names):
    expected = [number for number, label in enumerate(labels) if label == name]
    assert index.members(class_id).tolist() == expected


def test_frames_equal_those_of_tensorflow(tmp_path):
  path = tmp_path / "records"
  records = [b"", b"a", bytes(range(256)) * 5]
  with tf.io.TFRecordWriter(str(path)) as file:
    for record in records:
      file.write(record)
  assert path.read_bytes() == b"".join(map(tfrecord.frame_record, records))


@pytest.mark.parametrize(
  "position, damage",
  [(0, "a corrupt length"), (9, "a corrupt length"), (30, "corrupt data")],
)
def test_a_flipped_byte_is_named_with_file_and_record(folder, position, damage):
  index = RecordIndex.open(str(folder))
  start = int(np.load(folder / "index" / "offsets.npy")[12])
  _flip(_shard(folder, 2), start + position)
  with pytest.raises(
    UserError, match=rf"records-00002\.tfrecord: record 2 has {damage}"
  ):
    index.read([12])


def test_a_flipped_last_byte_is_named(folder):
  index = RecordIndex.open(str(folder))
  _flip(_shard(folder, 4), -1)
  with pytest.raises(UserError, match=r"records-00004\.tfrecord: record 2 has corrupt"):
    index.read(np.arange(_NUM_RECORDS))


def test_other_records_of_a_corrupt_shard_are_readable(folder):
  expected = _plain_pass(folder)
  index = RecordIndex.open(str(folder))
  start = int(np.load(folder / "index" / "offsets.npy")[12])
  _flip(_shard(folder, 2), start + 30)
  assert index.read([11, 13]) == [expected[11], expected[13]]


def test_shard_truncated_while_it_is_read_is_named(folder):
  index = RecordIndex.open(str(folder))
  path = _shard(folder, 1)
  path.write_bytes(path.read_bytes()[:-7])
  with pytest.raises(
    UserError, match=r"records-00001\.tfrecord: record 4 is truncated"
  ):
    index.read([9])


def test_shard_removed_while_it_is_read_is_named(folder):
  index = RecordIndex.open(str(folder))
  _shard(folder, 3).unlink()
  with pytest.raises(UserError, match=r"records-00003\.tfrecord: record 1 can't be"):
    index.read([16])


def test_a_truncated_shard_is_named_when_the_index_is_opened(folder):
  path = _shard(folder, 0)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match=r"records-00000\.tfrecord has \d+ bytes but had"):
    RecordIndex.open(str(folder))


def test_a_missing_shard_is_named_when_the_index_is_opened(folder):
  _shard(folder, 1).unlink()
  with pytest.raises(UserError, match=r"records-00001\.tfrecord is in the index but"):
    RecordIndex.open(str(folder))


def test_truncated_index_array_is_named(folder):
  path = folder / "index" / "labels.npy"
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(UserError, match=r"labels\.npy of the index is damaged"):
    RecordIndex.open(str(folder))


def test_an_index_array_of_another_index_is_named(folder):
  np.save(folder / "index" / "labels.npy", np.zeros(7, np.int32))
  with pytest.raises(
    UserError, match=r"labels\.npy of the index is damaged \(int32\[7"
  ):
    RecordIndex.open(str(folder))


def test_a_missing_index_array_is_named(folder):
  (folder / "index" / "offsets.npy").unlink()
  with pytest.raises(UserError, match=r"offsets\.npy of the index is damaged"):
    RecordIndex.open(str(folder))


def test_a_damaged_manifest_is_named(folder):
  path = folder / "index" / "manifest.json"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"manifest\.json is damaged"):
    RecordIndex.open(str(folder))


@pytest.mark.parametrize("name", ["", "gone", "records-00000.tfrecord"])
def test_folder_without_an_index_is_named(folder, name):
  (folder / "index").rename(folder / "elsewhere")
  with pytest.raises(UserError, match="has no index; run --mode=ingest first"):
    RecordIndex.open(str(folder / name))


@pytest.mark.parametrize("content", ["null", "[]", '{"version": 1, "shards": 3}'])
def test_manifest_of_another_structure_is_named(folder, content):
  (folder / "index" / "manifest.json").write_text(content)
  with pytest.raises(UserError, match=r"manifest\.json is damaged"):
    RecordIndex.open(str(folder))


def test_number_of_open_shards_is_bounded(folder, monkeypatch):
  monkeypatch.setattr("trainer.data.records._MAX_OPEN_SHARDS", 1)
  opened: weakref.WeakSet = weakref.WeakSet()
  num_open = []
  true_open = RecordIndex._open_uncached

  def counted(self, shard):
    file = true_open(self, shard)
    opened.add(file)
    num_open.append(len(opened))
    return file

  monkeypatch.setattr(RecordIndex, "_open_uncached", counted)
  index = RecordIndex.open(str(folder))
  numbers = np.random.default_rng(0).permutation(_NUM_RECORDS)
  expected = _plain_pass(folder)
  assert index.read(numbers) == [expected[number] for number in numbers]
  assert len(num_open) == 5
  assert max(num_open) <= 2
