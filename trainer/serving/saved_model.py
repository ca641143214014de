"""The encoder as a SavedModel that needs TensorFlow and nothing else.

Signatures, for any number of examples, or, with `_fixed` after their name, for one
number and static shapes:

- `serving_default`: "inputs" [B, *shape] float32 → "embeddings" [B, D] float32;
- `images`: "files" [B] string, bytes of image files → the same, if inputs are images.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any, Callable, Optional

import tensorflow as tf

from trainer.data.decode import Decoder

FOLDER, SCRIPT_NAME = "saved_model", "embed_images.py"
_SCRIPT = os.path.join(os.path.dirname(__file__), SCRIPT_NAME)


def save(
  encoder: tf.keras.Model,
  decoder: Decoder,
  folder: str,
  *,
  fixed_batch_size: Optional[int] = None,
) -> str:
  """Writes the SavedModel, and a script beside it that embeds image files with it.

  Args:
    encoder: its variables exist.
    decoder: makes inputs of image files, if inputs are images.
    folder: of all that is exported; has no SavedModel yet.
    fixed_batch_size: B of the signatures with static shapes; None for no such.

  Returns:
    Path of the SavedModel.
  """
  functions = {
    "serving_default": _of_inputs(encoder, tf.TensorSpec([None, *decoder.shape]))
  }
  decode_files = getattr(decoder, "decode_files", None)
  if decode_files is not None:
    functions["images"] = _of_files(encoder, decode_files)
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, FOLDER)
  module = tf.Module()
  module.weights = list(encoder.variables)
  tf.saved_model.save(module, path, _signatures(functions, fixed_batch_size))
  if decode_files is not None:
    shutil.copyfile(_SCRIPT, os.path.join(folder, SCRIPT_NAME))
  return path


def _of_inputs(encoder: tf.keras.Model, spec: tf.TensorSpec) -> Any:
  @tf.function(input_signature=[tf.TensorSpec(spec.shape, spec.dtype, name="inputs")])
  def embed(inputs):
    return {"embeddings": encoder(inputs, training=False)}

  return embed


def _of_files(
  encoder: tf.keras.Model, decode_files: Callable[[tf.Tensor], tf.Tensor]
) -> Any:
  @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="files")])
  def embed_images(files):
    return {"embeddings": encoder(decode_files(files), training=False)}

  return embed_images


def _signatures(
  functions: Mapping[str, Any], fixed_batch_size: Optional[int]
) -> dict[str, Any]:
  signatures = dict(functions)
  if fixed_batch_size is not None:
    for name, function in functions.items():
      [spec] = function.input_signature
      fixed = tf.TensorSpec([fixed_batch_size, *spec.shape[1:]], spec.dtype, spec.name)
      whole = tf.function(function.python_function, input_signature=[fixed])
      signatures[f"{name}_fixed"] = whole
  return signatures
