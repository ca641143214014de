"""Exports of an encoder, as SavedModel and TensorFlow Lite, each verified.

Signatures accept any number of examples. With the suffix `_fixed` they accept one fixed
number and have static shapes.

- `serving_default`: "inputs" [B, *shape] float32 → "embeddings" [B, D] float32;
- `images`: "files" [B] string, bytes of image files → the same, if inputs are images.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Callable, Optional

import tensorflow as tf

from trainer.config import run_config
from trainer.data.images import Decoder
from trainer.runtime.lease import locked_folder
from trainer.serving import model_card

FOLDER, SCRIPT_NAME = "saved_model", "embed_images.py"
_SCRIPT = os.path.join(os.path.dirname(__file__), SCRIPT_NAME)

LITE_FILE = "encoder.tflite"

_STAGING = "staging"
# All files of an export; the card describes the others, and comes last.
_NAMES = (
  *(FOLDER, SCRIPT_NAME, LITE_FILE, run_config.CONFIG_FILE),
  model_card.MODEL_CARD_FILE,
)

# Number of records compared; TensorFlow Lite takes one at a time.
_NUM_LITE = 4


def save_saved_model(
  encoder: tf.keras.Model,
  decoder: Decoder,
  folder: str,
  *,
  fixed_batch_size: Optional[int] = None,
) -> str:
  """Writes the SavedModel, and a script that embeds image files with it.

  Args:
    encoder: its variables exist.
    decoder: decodes image files to inputs, if inputs are images.
    folder: of the export; has no SavedModel yet.
    fixed_batch_size: B of the signatures with static shapes; None for none.

  Returns:
    Path of the SavedModel.
  """
  functions = {
    "serving_default": _embed_inputs_fn(encoder, tf.TensorSpec([None, *decoder.shape]))
  }
  decode_files = getattr(decoder, "decode_files", None)
  if decode_files is not None:
    functions["images"] = _embed_files_fn(encoder, decode_files)
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, FOLDER)
  module = tf.Module()
  module.weights = list(encoder.variables)
  tf.saved_model.save(module, path, _signatures(functions, fixed_batch_size))
  if decode_files is not None:
    shutil.copyfile(_SCRIPT, os.path.join(folder, SCRIPT_NAME))
  return path


def _embed_inputs_fn(encoder: tf.keras.Model, spec: tf.TensorSpec) -> Any:
  @tf.function(input_signature=[tf.TensorSpec(spec.shape, spec.dtype, name="inputs")])
  def embed(inputs):
    return {"embeddings": encoder(inputs, training=False)}

  return embed


def _embed_files_fn(
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
      fixed_function = tf.function(function.python_function, input_signature=[fixed])
      signatures[f"{name}_fixed"] = fixed_function
  return signatures


def save_lite(saved_model: str, folder: str) -> str:
  """Converts the signature for tensors, one input at a time.

  Args:
    saved_model: path of the SavedModel.
    folder: of the output file.

  Returns:
    Path of the file.
  """
  converter = tf.lite.TFLiteConverter.from_saved_model(
    saved_model, signature_keys=["serving_default"]
  )
  path = os.path.join(folder, LITE_FILE)
  with open(path, "wb") as file:
    file.write(converter.convert())
  return path


@contextlib.contextmanager
def replacing_folder(folder: str) -> Iterator[str]:
  """Replaces all files of an export, if no error is raised inside.

  Args:
    folder: of the export; is created if it is missing.

  Yields:
    A temporary folder for the new export.

  Raises:
    UserError: another process exports into the folder.
  """
  staging_dir = os.path.join(folder, _STAGING)
  os.makedirs(folder, exist_ok=True)
  with locked_folder(folder, "exporting into"):
    shutil.rmtree(staging_dir, ignore_errors=True)
    os.makedirs(staging_dir)
    try:
      yield staging_dir
      _publish(staging_dir, folder)
    finally:
      shutil.rmtree(staging_dir)


def _publish(staging_dir: str, folder: str) -> None:
  for name in reversed(_NAMES):
    _remove_path(os.path.join(folder, name))
  for name in _NAMES:
    if os.path.exists(os.path.join(staging_dir, name)):
      os.replace(os.path.join(staging_dir, name), os.path.join(folder, name))


def _remove_path(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.exists(path):
    os.remove(path)


def saved_model_difference(
  encoder: tf.keras.Model, decoder: Decoder, records: tf.Tensor, path: str
) -> dict[str, float]:
  """Compares each signature of a SavedModel with the encoder and decoder.

  Args:
    encoder: the exported encoder.
    decoder: decodes records to inputs, and image files if inputs are images.
    records: [B] string, serialized examples.
    path: of the SavedModel.

  Returns:
    The largest difference of a coordinate by signature, as a share of the longest
    embedding; NaN if one is not finite.
  """
  inputs = decoder(records)
  found = {}
  for name, embed in tf.saved_model.load(path).signatures.items():
    [(argument, spec)] = embed.structured_input_signature[1].items()
    given = _files(inputs) if argument == "files" else inputs
    if spec.shape[0] is not None:
      given = tf.gather(given, tf.range(spec.shape[0]) % tf.shape(given)[0])
    wanted = decoder.decode_files(given) if argument == "files" else given  # type: ignore[attr-defined]
    got = embed(**{argument: given})["embeddings"]
    found[name] = _largest_difference(got, encoder(wanted, training=False))
  return found


def lite_difference(
  encoder: tf.keras.Model, decoder: Decoder, records: tf.Tensor, path: str
) -> float:
  """Compares a TensorFlow Lite model with the encoder, on some of the records."""
  inputs = decoder(records[:_NUM_LITE])
  embed = tf.lite.Interpreter(model_path=path).get_signature_runner()
  got = [embed(inputs=each[None].numpy())["embeddings"] for each in inputs]
  return _largest_difference(tf.concat(got, axis=0), encoder(inputs, training=False))


def _files(inputs: tf.Tensor) -> tf.Tensor:
  """Returns image files of inputs, [B] string; every other one has to be resized."""
  images = tf.cast(tf.round(inputs * 255.0), tf.uint8)
  size = tf.shape(images)[1:3]
  large = tf.image.resize(images, 2 * size, method="nearest")
  files = [
    tf.io.encode_png(large[place] if place % 2 else images[place])
    for place in range(len(images))
  ]
  return tf.stack(files)


def _largest_difference(got: tf.Tensor, wanted: tf.Tensor) -> float:
  norm = tf.reduce_max(tf.norm(wanted, axis=1))
  return float(tf.reduce_max(tf.abs(got - wanted)) / tf.maximum(norm, 1e-30))
