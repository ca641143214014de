"""Mode `export`: the trained encoder as a SavedModel with a card, tried before it goes.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.run import Run
from trainer.serving import lite, model_card, saved_model

_FORMATS = ("saved_model", "tflite")
_NUM_TRIED, _LARGEST_ERROR = 32, 1e-6


def main(run: Run) -> None:
  """Exports the newest checkpoint of a run."""
  trained = Evaluation()  # type: ignore[call-arg]  # Its parts are gin's.
  export = Export()
  step = trained.restore(run.model_dir)
  folder = export.folder or os.path.join(run.model_dir, "export")
  path = saved_model.save(
    trained.encoder,
    trained.dataset.decoder,
    folder,
    fixed_batch_size=export.fixed_batch_size,
  )
  error = largest_error(trained, path)
  if not error <= _LARGEST_ERROR:
    raise UserError(
      f"{path} gives embeddings that differ by {error:.1e} from the encoder's; it is "
      "not to be used."
    )
  logging.info("The exported model's embeddings differ by at most %.1e.", error)
  if "tflite" in export.formats:
    print(f"{'TensorFlow Lite':<20}{lite.save(path, folder)}")
  card = model_card.write(folder, _facts(run, trained, step), model_dir=run.model_dir)
  print(f"{'SavedModel':<20}{path}\n{'model card':<20}{card}")


@gin.configurable("export")
@dataclasses.dataclass(frozen=True)
class Export:
  """What is exported, of the encoder and the decoder of `evaluate`.

  Attributes:
    folder: where it goes; None for `export` in the run's folder.
    fixed_batch_size: B of further signatures with static shapes; None for no such.
    formats: "saved_model" always, and "tflite".

  Raises:
    UserError: an unknown format, or a batch size below 1.
  """

  folder: Optional[str] = None
  fixed_batch_size: Optional[int] = None
  formats: Sequence[str] = ("saved_model",)

  def __post_init__(self):
    for name in self.formats:
      if name not in _FORMATS:
        raise UserError(f"export.formats: {name!r} is none of {_FORMATS}.")
    if self.fixed_batch_size is not None and self.fixed_batch_size < 1:
      raise UserError(
        f"export.fixed_batch_size={self.fixed_batch_size} must be at least 1."
      )


def largest_error(trained: Evaluation, path: str) -> float:
  """How far a SavedModel's embeddings of some records are from the encoder's.

  Args:
    trained: encoder, records and decoder.
    path: of the SavedModel.

  Returns:
    The largest difference of a coordinate; NaN if one is not finite.
  """
  index = trained.dataset.index
  numbers = np.linspace(0, index.num_records - 1, _NUM_TRIED).astype(np.int64)
  inputs = trained.dataset.decoder(tf.constant(index.read(numbers), tf.string))
  exported = tf.saved_model.load(path).signatures["serving_default"]
  difference = exported(inputs=inputs)["embeddings"] - trained.encoder(inputs)
  return float(np.max(np.abs(difference)))


def _facts(run: Run, trained: Evaluation, step: int) -> model_card.Facts:
  dataset = trained.dataset
  return model_card.Facts(
    name=os.path.basename(os.path.abspath(run.model_dir)),
    step=step,
    config_hash=run.config.hash,
    input_shape=tuple(dataset.decoder.shape),
    embedding_size=trained.encoder.embedding_size,
    data={
      **dataset.index.facts(),
      "classes trained on": len(dataset.train_classes),
      "classes evaluated on": len(dataset.evaluation_classes),
    },
  )
