"""The encoder for TensorFlow Lite, by TensorFlow's own converter."""

from __future__ import annotations

import os

import tensorflow as tf

FILE_NAME = "encoder.tflite"


def save(saved_model: str, folder: str) -> str:
  """Converts the signature for tensors, one input at a time.

  Args:
    saved_model: path of the SavedModel.
    folder: where the file goes.

  Returns:
    Path of the file.
  """
  converter = tf.lite.TFLiteConverter.from_saved_model(
    saved_model, signature_keys=["serving_default"]
  )
  path = os.path.join(folder, FILE_NAME)
  with open(path, "wb") as file:
    file.write(converter.convert())
  return path
