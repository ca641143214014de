"""Image sizes from headers, computed in the graph; refused decompression bombs."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import image_formats, images
from trainer.data.dataset import Dataset, ListSplit
from trainer.data.images import ImageDecoder
from trainer.data.indexing import index_records
from trainer.data.pipeline import Shard
from trainer.data.records import record_error
from trainer.data.samplers import PKSampler
from trainer.errors import UserError

_WIDTH, _HEIGHT = 20_000, 30_011


def _chunk(kind, content):
  crc = struct.pack(">I", zlib.crc32(kind + content))
  return struct.pack(">I", len(content)) + kind + content + crc


def _png(width, height):
  head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  rows = zlib.compress(b"\0" * 1000)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    [_chunk(b"IHDR", head), _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
  )


def _jpeg(width, height):
  file = bytearray(tf.io.encode_jpeg(np.zeros((8, 8, 3), np.uint8)).numpy())
  place = file.index(b"\xff\xc0") + 5
  file[place : place + 4] = struct.pack(">HH", height, width)
  return bytes(file)


def _bmp(width, height):
  return struct.pack(
    "<2sIIIIiiHHIIiiII", b"BM", 54, 0, 54, 40, width, height, 1, *[0] * 7
  )


def _webp(kind, size):
  return b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(4) + size + bytes(9)


def _webp_lossless(width, height):
  bits = struct.pack("<I", width - 1 | height - 1 << 14)
  return _webp(b"VP8L", b"\x2f" + bits)


def _webp_extended(width, height):
  sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
  return _webp(b"VP8X", bytes(4) + sizes)


_FILES = {
  "png": _png(_WIDTH, _HEIGHT),
  "jpeg": _jpeg(_WIDTH, _HEIGHT),
  "gif": b"GIF89a" + struct.pack("<HH", _WIDTH, _HEIGHT),
  "bmp": _bmp(_WIDTH, _HEIGHT),
  "bmp from its top": _bmp(_WIDTH, -_HEIGHT),
  "webp": _webp(b"VP8 ", bytes(6) + struct.pack("<HH", 16_000, 16_001)),
  "webp lossless": _webp_lossless(16_000, 16_001),
  "webp extended": _webp_extended(_WIDTH, _HEIGHT),
  "none": b"",
  "a beginning": b"\x89PNG",
  "text": b"no image at all, and longer than a head",
}


def test_sizes_are_read_from_the_headers():
  heads = [image_formats.read_image_head(file) for file in _FILES.values()]
  expected = [0 if head is None else head.width * head.height for head in heads]
  sizes = images.read_declared_size(tf.constant(list(_FILES.values()))).num_pixels
  assert dict(zip(_FILES, sizes.numpy())) == dict(zip(_FILES, expected))
  assert sorted(set(expected)) == [0, 16_000 * 16_001, _WIDTH * _HEIGHT]


def test_jpeg_without_a_size_is_an_error():
  with pytest.raises(tf.errors.InvalidArgumentError, match="Invalid JPEG"):
    images.read_declared_size(tf.constant([b"\xff\xd8\xff" + bytes(40)]))


def _record(label, file):
  values = {"label": label, "image": file}
  features = {
    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    for name, value in values.items()
  }
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString()


@pytest.fixture
def folder(tmp_path):
  """Twelve records of three classes, indexed in place; one is a bomb."""
  files = [tf.io.encode_png(np.full((4, 4, 1), n, np.uint8)).numpy() for n in range(12)]
  files[4] = _png(20_000, 20_000)
  with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
    for number, file in enumerate(files):
      writer.write(_record(b"c%d" % (number % 3), file))
  index_records(str(tmp_path), label_feature="label")
  return tmp_path


def _batches(folder, bad_records):
  dataset = Dataset(
    folder=str(folder),
    split=ListSplit(evaluation_classes=["c2"]),
    decoder=ImageDecoder(height=4, width=4, channels=1),
    bad_records=bad_records,
  )
  sampler = PKSampler(
    dataset.index,
    classes_per_batch=2,
    samples_per_class=4,
    seed=0,
    classes=dataset.train_classes,
  )
  batches = dataset.training_batches(sampler)
  with batches.reporting_bad_records(0, 1):
    return list(batches.dataset(Shard(0, 1, 1), num_steps=1))


def test_decompression_bomb_in_a_record_is_refused_by_name(folder):
  with pytest.raises(
    UserError, match=r"a\.tfrecord: record 4 can't be decoded: .*max_pixels"
  ):
    _batches(folder, "refuse")


def test_decompression_bomb_in_a_record_is_replaced_and_counted(folder, caplog):
  [batch] = _batches(folder, "replace")
  values = np.round(batch.inputs[:, 0, 0, 0].numpy() * 255).astype(int)
  assert sorted(values) == [0, 1, 3, 6, 7, 7, 9, 10]
  assert "record 4 can't be decoded: an image declares more pixels" in caplog.text
  assert "(bad records so far: 1)" in caplog.text


def test_pixel_limit_is_configurable(folder):
  index = index_records(str(folder), label_feature="label")
  small = ImageDecoder(height=4, width=4, channels=1, max_pixels=15)
  assert "more pixels than the 15 allowed" in record_error(index, small, 0)
  assert record_error(index, ImageDecoder(height=4, width=4, channels=1), 0) is None


def test_pixel_limit_below_one_is_refused():
  with pytest.raises(UserError, match=r"max_pixels=0 must be at least 1"):
    ImageDecoder(height=4, width=4, channels=1, max_pixels=0)


@pytest.mark.parametrize("num_files", [1, 15, 16, 17, 97])
def test_batches_of_any_size_equal_single_decoding(num_files):
  pictures = np.random.default_rng(num_files).integers(
    0, 256, (num_files, 5, 4, 3), np.uint8
  )
  files = tf.constant([tf.io.encode_png(each).numpy() for each in pictures])
  decoder = ImageDecoder(height=5, width=4, channels=3)
  decoded = tf.function(decoder.decode_files)(files).numpy()
  np.testing.assert_array_equal(np.rint(decoded * 255), pictures)
