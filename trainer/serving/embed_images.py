"""Embeds image files with the SavedModel in the same folder.

`python embed_images.py IMAGE [IMAGE ...]` prints one JSON object per image: its path,
and its embedding or error. Needs TensorFlow and nothing else.
"""

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf


def main(paths):
  """Prints the embeddings; returns 1 if an image fails, 2 if there are no images."""
  if not paths:
    print("usage: python embed_images.py IMAGE [IMAGE ...]", file=sys.stderr)
    return 2
  here = os.path.dirname(os.path.abspath(__file__))
  model = tf.saved_model.load(os.path.join(here, "saved_model"))
  embed = model.signatures["images"]
  num_failed = 0
  for path in paths:
    try:
      with open(path, "rb") as file:
        embeddings = embed(files=tf.constant([file.read()]))["embeddings"]
      answer = {"image": path, "embedding": embeddings.numpy()[0].tolist()}
    except (OSError, tf.errors.InvalidArgumentError) as error:
      answer = {"image": path, "error": str(error).splitlines()[0]}
      num_failed += 1
    print(json.dumps(answer))
  return 1 if num_failed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
