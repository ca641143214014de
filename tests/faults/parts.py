"""Parts that inject or record faults; gin files import them by --allow_gin_import."""

from __future__ import annotations

import hashlib
import json
import os
import time

import gin
import tensorflow as tf


@gin.register
class HarmfulDecoder:
  """Decodes like another decoder except for one record; hangs while a file exists.

  Args:
    decoder: the other.
    not_finite_key: key of the record whose pixels become NaN; "" for none.
    large_key: key of the record whose pixels are multiplied; "" for none.
    factor: by how much; pixels stay finite.
    hang_file: path of the file; "" for none.
  """

  def __init__(
    self,
    *,
    decoder,
    not_finite_key: str = "",
    large_key: str = "",
    factor: float = 1.0,
    hang_file: str = "",
  ):
    self.shape, self.features = decoder.shape, decoder.features
    self._decoder = decoder
    self._key = not_finite_key or large_key
    self._factor = float("nan") if not_finite_key else factor
    self._hang_file = hang_file

  def __call__(self, records):
    images = self._decoder(records)
    if self._hang_file:
      images = tf.numpy_function(self._wait, [images], tf.float32)
      images = tf.ensure_shape(images, [records.shape[0], *self.shape])
    if self._key:
      feature = {"key": tf.io.FixedLenFeature([], tf.string)}
      keys = tf.io.parse_example(records, feature)["key"]
      bad = tf.reshape(tf.equal(keys, self._key), [-1, 1, 1, 1])
      images = tf.where(bad, (images + 1.0) * self._factor, images)
    return images

  def _wait(self, images):
    while os.path.exists(self._hang_file):
      time.sleep(0.05)
    return images


@gin.register
def noting_weights(*, optimizer, file: str):
  """An optimizer of one of several workers that records its updated weights.

  Args:
    optimizer: makes the updates.
    file: path that gets a line for each update, its step and the weights' SHA-256; the
      worker's number is added at its end.
  """

  apply_gradients = optimizer.apply_gradients

  def apply_and_note(gradients_and_weights, **options):
    pairs = list(gradients_and_weights)
    apply_gradients(pairs, **options)
    weights = [tf.convert_to_tensor(weight) for _, weight in pairs]
    tf.numpy_function(note, [optimizer.iterations, *weights], [])

  def note(step, *weights):
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights))
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    with open(f"{file}-{index}", "a", encoding="ascii") as lines:
      lines.write(f"{step} {digest.hexdigest()}\n")

  optimizer.apply_gradients = apply_and_note
  return optimizer
