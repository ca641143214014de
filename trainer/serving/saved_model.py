"""Exports of an encoder: SavedModel and TensorFlow Lite, each verified, and model card.

Signatures accept any number of examples. With the suffix `_fixed` they accept one fixed
number and have static shapes.

- `serving_default`: "inputs" [B, *shape] float32 → "embeddings" [B, D] float32;
- `images`: "files" [B] string, bytes of image files → the same, if inputs are images.

`MODEL_CARD.md` has a description and measured results.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Callable, NamedTuple, Optional

import tensorflow as tf

from trainer import __version__
from trainer.config import run_config
from trainer.data.images import Decoder
from trainer.retrieval.results import Results, result_titles
from trainer.runtime import filesystem
from trainer.runtime.lease import locked_folder

MODEL_CARD_FILE = "MODEL_CARD.md"

FOLDER, SCRIPT_NAME = "saved_model", "embed_images.py"
_SCRIPT = os.path.join(os.path.dirname(__file__), SCRIPT_NAME)

LITE_FILE = "encoder.tflite"

_STAGING = "staging"
# All files of an export; the card describes the others, and comes last.
_NAMES = (
  *(FOLDER, SCRIPT_NAME, LITE_FILE, run_config.CONFIG_FILE),
  MODEL_CARD_FILE,
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


class ModelCardInfo(NamedTuple):
  """Content of the card in addition to the evaluation results.

  Attributes:
    name: of the run.
    step: number of steps the encoder was trained.
    checkpoint: which of the run's, "newest" or "best".
    config_hash: of the run's configuration.
    input_shape: of one input.
    is_image: whether inputs are images, with values in [0, 1].
    embedding_size: D.
    data: facts about records and classes, by title.
  """

  name: str
  step: int
  checkpoint: str
  config_hash: str
  input_shape: tuple[int, ...]
  is_image: bool
  embedding_size: int
  data: Mapping[str, Any]


def write_model_card(folder: str, info: ModelCardInfo, *, model_dir: str) -> str:
  """Writes the card to the export folder.

  Args:
    folder: of the export.
    info: about the encoder.
    model_dir: folder of the run, for its results.

  Returns:
    Path of the card.
  """
  inputs = f"float32 inputs of shape {list(info.input_shape)}"
  if info.is_image:
    inputs = f"{inputs}, images with values in [0, 1],"
  training = {
    "steps": info.step,
    "checkpoint": info.checkpoint,
    "configuration": f"{info.config_hash} ({run_config.CONFIG_FILE} in this folder)",
  }
  lines = [
    f"# {info.name}",
    "",
    f"Maps {inputs} to embeddings of {info.embedding_size} dimensions. Compare them "
    "by Euclidean distance.",
    *_section("Training", training),
    *_section("Data", info.data),
    *_section(
      "Retrieval on classes outside the training split", _measured(model_dir, info.step)
    ),
    *_section("Software", {"trainer": __version__, "TensorFlow": tf.__version__}),
    *_section("Files (SHA-256)", _hashes(folder)),
  ]
  path = os.path.join(folder, MODEL_CARD_FILE)
  filesystem.replace_file(path, "\n".join(lines) + "\n")
  return path


def _section(title: str, rows: Mapping[str, Any]) -> list[str]:
  cells = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
  return ["", f"## {title}", "", "| | |", "|---|---|", *cells]


def _cell(value: Any) -> str:
  return " ".join(str(value).replace("|", "\\|").split())


def _measured(model_dir: str, step: int) -> dict[str, str]:
  """Returns the main metrics, if they belong to the exported weights."""
  latest = Results(model_dir).by_moment.get("latest", {})
  if latest.get("step") != step:
    return {"not measured": f"run --mode=evaluate after step {step}"}
  intervals = latest.get("intervals", {})
  found = {}
  for name, title in result_titles(latest).items():
    found[title] = f"{latest[name]:.4f}"
    if name in intervals:
      low, high = intervals[name]
      found[title] += f" (95 %: {low:.4f} to {high:.4f})"
  return {**found, "queries": latest.get("eval/num_queries", "unknown")}


def _hashes(folder: str) -> dict[str, str]:
  """Returns the hash of every exported file, by its path in the folder."""
  found = {}
  for parent, _, names in sorted(os.walk(folder)):
    for name in sorted(names):
      path = os.path.join(parent, name)
      if name != MODEL_CARD_FILE:
        found[os.path.relpath(path, folder)] = filesystem.sha256_of(path)
  return found
