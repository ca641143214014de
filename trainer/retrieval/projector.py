"""Files of TensorBoard's projector: vectors, metadata and pictures of a sample.

`tensorboard --logdir=MODEL_DIR` finds them by `projector_config.pbtxt`.

Shapes: G items, D dimensions.
"""

from __future__ import annotations

import base64
import os

import numpy as np
import tensorflow as tf

from trainer.data import paths
from trainer.retrieval.evidence import EmbeddingMap, Sprite

CONFIG_FILE = "projector_config.pbtxt"
_FOLDER = "projector"
_NEAREST = {True: "wrong", False: "right", None: "not asked"}
_VECTORS, _METADATA, _SPRITE = "vectors.tsv", "metadata.tsv", "sprite.png"


def write(model_dir: str, sample: EmbeddingMap, embeddings: np.ndarray) -> None:
  """Writes the files; the config last, so that it names none that is not there.

  Args:
    model_dir: folder of the run.
    sample: which items, with their classes and pictures.
    embeddings: [G, D] float32, of all items.
  """
  os.makedirs(os.path.join(model_dir, _FOLDER), exist_ok=True)
  vectors = embeddings[np.asarray(sample.items)]
  lines = ["\t".join(f"{value:.6g}" for value in vector) for vector in vectors]
  _write(model_dir, _VECTORS, "\n".join(lines).encode())
  # TensorBoard takes the first line for a head only where there are two columns.
  rows = zip(sample.items, sample.class_names, sample.is_mistake)
  lines = [f"{item}\t{_one_cell(name)}\t{_NEAREST[no]}" for item, name, no in rows]
  _write(model_dir, _METADATA, "\n".join(["item\tclass\tnearest", *lines]).encode())
  config = (
    'embeddings {\n  tensor_name: "embeddings"\n'
    f'  tensor_path: "{_FOLDER}/{_VECTORS}"\n'
    f'  metadata_path: "{_FOLDER}/{_METADATA}"\n'
  )
  if sample.sprite is not None:
    _write(model_dir, _SPRITE, _png(sample.sprite))
    sizes = f"{sample.sprite.width} single_image_dim: {sample.sprite.height}"
    config += (
      f'  sprite {{ image_path: "{_FOLDER}/{_SPRITE}" single_image_dim: {sizes} }}\n'
    )
  paths.replace_file(os.path.join(model_dir, CONFIG_FILE), config + "}\n")


def _write(model_dir: str, name: str, content: bytes) -> None:
  paths.replace_file(os.path.join(model_dir, _FOLDER, name), content)


def _one_cell(text: str) -> str:
  """The text without what ends a cell or a line."""
  return " ".join(text.split()) or "-"


def _png(sprite: Sprite) -> bytes:
  """The sprite as PNG, whatever it is kept as."""
  _, _, content = sprite.picture.partition("base64,")
  image = tf.io.decode_image(base64.b64decode(content), expand_animations=False)
  return tf.io.encode_png(image).numpy()
