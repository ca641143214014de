"""Bad records: replaced by others of their class on request, and always named."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import ingestion
from trainer.data.dataset import Dataset, ListSplit
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex, Replacements, record_error
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError

_DECODER = ImageDecoder(height=4, width=4, channels=1)
_UNDECODABLE, _CORRUPT = 4, 9


@pytest.fixture
def folder(tmp_path):
  """Thirty records of three classes; one has no image, one a flipped byte."""
  items = [
    Item(str(n), f"c{n % 3}", encode_png(np.full((4, 4), 8 * n, np.uint8)))
    for n in range(30)
  ]
  items[_UNDECODABLE] = Item("none", "c1", features={"x": 1})
  ingestion.write_records(items, str(tmp_path), records_per_shard=30, fingerprint={})
  start = int(np.load(tmp_path / "index" / "offsets.npy")[_CORRUPT])
  path = tmp_path / "records-00000.tfrecord"
  content = bytearray(path.read_bytes())
  content[start + 20] ^= 1
  path.write_bytes(content)
  _trust(tmp_path)
  return tmp_path


def _trust(folder):
  """Updates the manifest to the shard, as if it was damaged before ingest."""
  from trainer.data import manifest

  description = manifest.read(str(folder / "index"))
  shard = manifest.describe_shard(str(folder), description.shards[0].name, 30)
  manifest.write(
    str(folder / "index"),
    manifest.Manifest((shard,), 3, "label", description.source),
  )


def _numbers(folder, bad_records):
  dataset = Dataset(
    folder=str(folder),
    split=ListSplit(evaluation_classes=["c2"]),
    decoder=_DECODER,
    bad_records=bad_records,
  )
  sampler = PKSampler(
    dataset.index,
    classes_per_batch=2,
    samples_per_class=5,
    seed=0,
    classes=dataset.train_classes,
  )
  batches = dataset.training_batches(sampler)
  with batches.reporting_bad_records(0, 4):
    got = list(batches.dataset(Shard(0, 1, 1), num_steps=4))
  drawn = [sampler.batch(step).ravel() for step in range(4)]
  numbers = [np.round(b.inputs[:, 0, 0, 0].numpy() * 255 / 8).astype(int) for b in got]
  for batch, of_inputs in zip(got, numbers):
    np.testing.assert_array_equal(batch.record_numbers, of_inputs)
  labels = [b.labels.numpy() for b in got]
  return np.stack(drawn), np.stack(numbers), np.stack(labels), dataset.index


def test_bad_records_are_replaced_by_the_next_record_of_their_class(folder, caplog):
  drawn, numbers, labels, index = _numbers(folder, "replace")
  assert _UNDECODABLE in drawn and _CORRUPT in drawn
  expected = np.where(drawn == _UNDECODABLE, _UNDECODABLE + 3, drawn)
  expected = np.where(expected == _CORRUPT, _CORRUPT + 3, expected)
  np.testing.assert_array_equal(numbers, expected)
  np.testing.assert_array_equal(labels, index.labels[drawn])
  assert "records-00000.tfrecord: record 4 can't be decoded" in caplog.text
  assert "records-00000.tfrecord: record 9 has corrupt data" in caplog.text
  assert "(bad records so far: 2)" in caplog.text


def test_bad_record_is_refused_by_default(folder):
  with pytest.raises(UserError, match=r"records-00000\.tfrecord: record [49] "):
    _numbers(folder, "refuse")


def test_a_class_without_any_good_record_is_refused(tmp_path):
  items = [
    Item(str(n), "ab"[n % 2], encode_png(np.eye(4, dtype=np.uint8))) for n in range(6)
  ]
  items[1::2] = [Item(str(n), "b", features={"x": 1}) for n in range(3)]
  ingestion.write_records(items, str(tmp_path), records_per_shard=9, fingerprint={})
  replacements = Replacements(RecordIndex.open(str(tmp_path)), _DECODER)
  with pytest.raises(UserError, match="Class 'b' has no record that can be read"):
    replacements.replace(np.array([0, 1]))


def test_good_records_are_unchanged_and_decoded_once(folder, monkeypatch):
  index = RecordIndex.open(str(folder))
  replacements = Replacements(index, _DECODER)
  numbers = np.array([0, 1, 2, 1])
  assert replacements.replace(numbers) is numbers
  monkeypatch.setattr(index, "read", None)
  np.testing.assert_array_equal(replacements.replace(numbers), numbers)
  assert replacements.num_bad == 0


def test_the_reason_names_file_and_record(folder):
  index = RecordIndex.open(str(folder))
  assert record_error(index, _DECODER, 0) is None
  assert "record 4 can't be decoded" in record_error(index, _DECODER, _UNDECODABLE)
  assert "record 9 has corrupt data" in record_error(index, _DECODER, _CORRUPT)


def test_unknown_choice_is_refused(folder):
  with pytest.raises(UserError, match=r"bad_records='skip' must be one of refuse"):
    Dataset(
      folder=str(folder),
      split=ListSplit(evaluation_classes=["c2"]),
      decoder=_DECODER,
      bad_records="skip",
    )


def test_tensor_decoder_still_decodes_batches():
  file = encode_png(np.full((4, 4), 51, np.uint8))
  feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))
  example = tf.train.Example(features=tf.train.Features(feature={"image": feature}))
  many = tf.constant([example.SerializeToString()] * 131)  # A prime: a scalar loop.
  np.testing.assert_allclose(_DECODER(many), np.full((131, 4, 4, 1), 0.2), atol=1e-6)


def test_records_that_are_replaced_are_not_blamed_for_other_failures(folder):
  index = RecordIndex.open(str(folder))
  sampler = PKSampler(index, classes_per_batch=3, samples_per_class=10, seed=0)
  batches = Batches(
    index, sampler, _DECODER, replacements=Replacements(index, _DECODER)
  )
  expected = pytest.raises(tf.errors.InvalidArgumentError, match="loss is no number")
  with expected, batches.reporting_bad_records(0, 0):
    raise tf.errors.InvalidArgumentError(None, None, "loss is no number")


def test_a_class_without_any_good_record_is_named_from_within_the_pipeline(tmp_path):
  items = [
    Item(str(n), "ab"[n % 2], encode_png(np.eye(4, dtype=np.uint8))) for n in range(6)
  ]
  items[1::2] = [Item(str(n), "b", features={"x": 1}) for n in range(3)]
  ingestion.write_records(items, str(tmp_path), records_per_shard=9, fingerprint={})
  index = RecordIndex.open(str(tmp_path))
  sampler = PKSampler(index, classes_per_batch=2, samples_per_class=2, seed=0)
  batches = Batches(
    index, sampler, _DECODER, replacements=Replacements(index, _DECODER)
  )
  expected = pytest.raises(UserError, match="Class 'b' has no record that can be read")
  with expected, batches.reporting_bad_records(0, 0):
    list(batches.dataset(Shard(0, 1, 1), num_steps=1))
