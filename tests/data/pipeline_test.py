"""The pipeline: batches follow the sampler and have static shapes on every replica."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import ingestion
from trainer.data.images import ImageDecoder, VectorDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler, SequentialSampler
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError

_NUM_CLASSES, _NUM_EACH = 6, 5
_DECODER = ImageDecoder(height=4, width=3, channels=1)


def _image(number):
  """Returns an image whose values are all 5 · number."""
  return np.full((4, 3), 5 * number, np.uint8)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("records"))
  items = [
    Item(f"item {n}", f"class {n % _NUM_CLASSES}", encode_png(_image(n)))
    for n in range(_NUM_CLASSES * _NUM_EACH)
  ]
  ingestion.write_records(items, folder, records_per_shard=7, fingerprint={})
  return RecordIndex.open(folder)


def _sampler(index):
  return PKSampler(index, classes_per_batch=4, samples_per_class=3, seed=0)


def _take(dataset, num_batches):
  return [tf.nest.map_structure(np.array, b) for b in dataset.take(num_batches)]


def _numbers(batch):
  return np.round(batch.inputs[:, 0, 0, 0] * 51).astype(int)


def test_batches_follow_the_sampler(index):
  sampler = _sampler(index)
  dataset = Batches(index, sampler, _DECODER).dataset(Shard(0, 1, 1), first_step=3)
  for step, batch in enumerate(_take(dataset, 5), start=3):
    numbers = sampler.batch(step).ravel()
    np.testing.assert_array_equal(_numbers(batch), numbers)
    np.testing.assert_array_equal(batch.labels, index.labels[numbers])
    np.testing.assert_array_equal(batch.weights, np.ones(12))
    np.testing.assert_array_equal(batch.record_numbers, numbers)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_replicas_together_have_the_global_batch_and_share_no_class(
  index, num_replicas
):
  sampler = _sampler(index)
  shard = Shard(0, num_replicas, num_replicas)
  batches = _take(Batches(index, sampler, _DECODER).dataset(shard), num_replicas)
  np.testing.assert_array_equal(
    np.concatenate([_numbers(batch) for batch in batches]), sampler.batch(0).ravel()
  )
  classes = [set(batch.labels) for batch in batches]
  assert sum(map(len, classes)) == len(set.union(*classes)) == 4


def test_worker_reads_only_its_shard_of_the_batch(index):
  sampler = _sampler(index)
  dataset = Batches(index, sampler, _DECODER).dataset(Shard(2, 1, 4))
  for step, batch in enumerate(_take(dataset, 3)):
    np.testing.assert_array_equal(_numbers(batch), sampler.batch(step)[2])


def test_padding_rows_have_weight_zero_and_no_class(index):
  sampler = SequentialSampler(np.arange(5), records_per_batch=4)
  batches = Batches(index, sampler, _DECODER)
  [_, last] = _take(batches.dataset(Shard(0, 1, 1), num_steps=2), 9)
  assert last.weights.tolist() == [1, 0, 0, 0]
  assert last.labels.tolist() == [4, -1, -1, -1]
  assert last.record_numbers.tolist() == [4, -1, -1, -1]


def test_shapes_are_static(index):
  dataset = Batches(index, _sampler(index), _DECODER).dataset(Shard(0, 2, 2))
  assert dataset.element_spec.inputs.shape == (6, 4, 3, 1)
  assert dataset.element_spec.labels.shape == (6,)


def test_an_image_of_another_size_and_colour_is_converted():
  image = tf.io.encode_jpeg(np.full((20, 30, 3), 200, np.uint8)).numpy()
  [got] = _DECODER(tf.constant([_example(image)]))
  assert got.shape == (4, 3, 1)
  np.testing.assert_allclose(got, 200 / 255, atol=0.02)


def test_vectors_are_unchanged():
  feature = tf.train.Feature(float_list=tf.train.FloatList(value=[1.5, -2.0]))
  features = tf.train.Features(feature={"vector": feature})
  example = tf.train.Example(features=features).SerializeToString()
  got = VectorDecoder(size=2)(tf.constant([example, example]))
  np.testing.assert_array_equal(got, [[1.5, -2.0], [1.5, -2.0]])


def _example(image):
  feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
  features = tf.train.Features(feature={"image": feature})
  return tf.train.Example(features=features).SerializeToString()


def test_a_record_that_does_not_decode_is_named(index):
  sampler = _sampler(index)
  batches = Batches(index, sampler, VectorDecoder(size=2))  # The records are images.
  expected = pytest.raises(
    UserError, match=r"records-0000\d\.tfrecord: record \d.* decoded"
  )
  with expected, batches.reporting_bad_records(0, 0):
    _take(batches.dataset(Shard(0, 1, 1)), 1)


@pytest.mark.parametrize(
  "make",
  [
    lambda: ImageDecoder(height=0, width=3, channels=1),
    lambda: ImageDecoder(height=4, width=3, channels=2),
    lambda: VectorDecoder(size=0),
  ],
)
def test_invalid_sizes_are_refused(make):
  with pytest.raises(UserError, match="at least 1"):
    make()


@pytest.mark.parametrize(
  ("first_replica", "expected"), [(0, [8, 9, 9, 9]), (1, [9, 9, 9, 9])]
)
def test_padding_rows_read_no_additional_record(index, first_replica, expected):
  index = copy.copy(index)  # Infinite pipelines of other tests may read the original.
  sampler = SequentialSampler(np.array([8, 9]), records_per_batch=8)
  read, true_read = [], index.read
  index.read = lambda n: read.append(n.tolist()) or true_read(n)
  dataset = Batches(index, sampler, _DECODER).dataset(
    Shard(first_replica, 1, 2), num_steps=1
  )
  [batch] = _take(dataset, 1)
  assert read == [expected]
  assert batch.weights.tolist() == ([1, 1, 0, 0] if first_replica == 0 else [0] * 4)


@pytest.mark.parametrize("error", [tf.errors.UnavailableError, tf.errors.AbortedError])
def test_failures_not_caused_by_records_propagate(index, error):
  batches = Batches(index, _sampler(index), VectorDecoder(size=2))
  with pytest.raises(error), batches.reporting_bad_records(0, 0):
    raise error(None, None, "a worker is gone")
