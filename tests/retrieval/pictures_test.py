"""Pictures of records, as decoded for the encoder, by position."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.data.images import ImageDecoder, VectorDecoder
from trainer.retrieval.pictures import pictures_of


class _Index:
  """Records of pictures with their number as grey value."""

  def read(self, numbers):
    return [_record(number) for number in numbers]


def _record(number):
  png = tf.io.encode_png(np.full((4, 6, 1), number % 256, np.uint8)).numpy()
  image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[png]))
  features = tf.train.Features(feature={"image": image})
  return tf.train.Example(features=features).SerializeToString()


def test_pictures_are_returned_in_the_order_of_positions():
  decoder = ImageDecoder(height=2, width=3, channels=3)
  record_numbers = np.arange(100, 250)
  files = pictures_of(_Index(), decoder, record_numbers)(np.array([149, 0, *range(70)]))
  images = [tf.io.decode_png(file).numpy() for file in files]
  assert {image.shape for image in images} == {(2, 3, 3)}
  assert [image[0, 0, 0] for image in images] == [249, 100, *range(100, 170)]


def test_vectors_have_no_pictures():
  assert pictures_of(_Index(), VectorDecoder(size=3), np.arange(3)) is None
