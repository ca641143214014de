"""How far what is exported is from the encoder, signature by signature.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.data.decode import Decoder

# TensorFlow Lite takes one at a time.
_NUM_LITE = 4


def of_saved_model(
  encoder: tf.keras.Model, decoder: Decoder, records: tf.Tensor, path: str
) -> dict[str, float]:
  """Compares each signature of a SavedModel with the encoder behind the decoder.

  Args:
    encoder: what was exported.
    decoder: makes inputs of records, and of image files if inputs are images.
    records: [B] string, serialized examples.
    path: of the SavedModel.

  Returns:
    By name of the signature the largest difference of a coordinate, as a share of the
    longest embedding; NaN if one is not finite.
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
    found[name] = _largest_share(got, encoder(wanted, training=False))
  return found


def of_lite(
  encoder: tf.keras.Model, decoder: Decoder, records: tf.Tensor, path: str
) -> float:
  """The same of a model for TensorFlow Lite, on some of the records."""
  inputs = decoder(records[:_NUM_LITE])
  embed = tf.lite.Interpreter(model_path=path).get_signature_runner()
  got = [embed(inputs=each[None].numpy())["embeddings"] for each in inputs]
  return _largest_share(tf.concat(got, axis=0), encoder(inputs, training=False))


def _files(inputs: tf.Tensor) -> tf.Tensor:
  """[B] string, image files of inputs; every other one has to be resized."""
  images = tf.cast(tf.round(inputs * 255.0), tf.uint8)
  size = tf.shape(images)[1:3]
  large = tf.image.resize(images, 2 * size, method="nearest")
  files = [
    tf.io.encode_png(large[place] if place % 2 else images[place])
    for place in range(len(images))
  ]
  return tf.stack(files)


def _largest_share(got: tf.Tensor, wanted: tf.Tensor) -> float:
  norm = tf.reduce_max(tf.norm(wanted, axis=1))
  return float(tf.reduce_max(tf.abs(got - wanted)) / tf.maximum(norm, 1e-30))
