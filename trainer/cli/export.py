"""Mode `export`: writes the trained encoder as a verified SavedModel with a card.

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

from trainer.cli.evaluate import Evaluation
from trainer.config import run_config
from trainer.errors import UserError, check_at_least, check_choice
from trainer.run import Run
from trainer.serving import saved_model

_FORMATS = ("saved_model", "tflite")
# Shares of an embedding's length; TensorFlow Lite sums in another order.
_NUM_RECORDS, _LARGEST_ERROR, _LARGEST_LITE_ERROR = 32, 1e-6, 1e-4
_TITLES = {
  saved_model.FOLDER: "SavedModel",
  saved_model.LITE_FILE: "TensorFlow Lite",
  run_config.CONFIG_FILE: "configuration",
  saved_model.MODEL_CARD_FILE: "model card",
}


def main(run: Run) -> None:
  """Exports a checkpoint of a run; keeps the old export if verification fails."""
  trained = Evaluation()  # type: ignore[call-arg]  # Its parts are gin's.
  export = Export()
  step = trained.restore(run.model_dir)
  folder = export.folder or os.path.join(run.model_dir, "export")
  with saved_model.replacing_folder(folder) as staging_dir:
    _make(trained, export, staging_dir)
    run_config.save_config(run.config, staging_dir)
    saved_model.write_model_card(
      staging_dir, _card_info(run, trained, step), model_dir=run.model_dir
    )
  for name, title in _TITLES.items():
    if os.path.exists(os.path.join(folder, name)):
      print(f"{title:<20}{os.path.join(folder, name)}")


@gin.configurable("export")
@dataclasses.dataclass(frozen=True)
class Export:
  """Options of the export of the encoder and the decoder of `evaluate`.

  Attributes:
    folder: output folder; None for `export` in the run's folder.
    fixed_batch_size: B of additional signatures with static shapes; None for none.
    formats: "saved_model" always, and "tflite".

  Raises:
    UserError: a format is unknown, or a batch size is below 1.
  """

  folder: Optional[str] = None
  fixed_batch_size: Optional[int] = None
  formats: Sequence[str] = ("saved_model",)

  def __post_init__(self):
    for name in self.formats:
      check_choice("export.formats", name, _FORMATS)
    check_at_least("export.fixed_batch_size", self.fixed_batch_size, 1)


def _make(trained: Evaluation, export: Export, folder: str) -> None:
  """Writes the models, and verifies them on some of the run's records.

  Raises:
    UserError: a model gives other embeddings than the encoder.
  """
  encoder, decoder = trained.encoder, trained.dataset.decoder
  index = trained.dataset.index
  numbers = np.linspace(0, index.num_records - 1, _NUM_RECORDS).astype(np.int64)
  records = tf.constant(index.read(numbers), tf.string)
  path = saved_model.save_saved_model(
    encoder, decoder, folder, fixed_batch_size=export.fixed_batch_size
  )
  errors = saved_model.saved_model_difference(encoder, decoder, records, path)
  for name, error in errors.items():
    check_error(f"Signature {name}", error, _LARGEST_ERROR)
  if "tflite" in export.formats:
    error = saved_model.lite_difference(
      encoder, decoder, records, saved_model.save_lite(path, folder)
    )
    check_error(saved_model.LITE_FILE, error, _LARGEST_LITE_ERROR)


def check_error(name: str, error: float, largest: float) -> None:
  """Checks and logs the difference between an exported model and the encoder.

  Args:
    name: of the exported model.
    error: share of an embedding's length.
    largest: the limit, likewise.

  Raises:
    UserError: the difference exceeds the limit.
  """
  if not error <= largest:
    raise UserError(
      f"{name} gives embeddings that differ by {error:.1e} of their length from the "
      f"encoder's; at most {largest:.0e} is allowed; nothing was exported."
    )
  logging.info("%s: embeddings differ by at most %.1e of their length.", name, error)


def _card_info(run: Run, trained: Evaluation, step: int) -> saved_model.ModelCardInfo:
  dataset = trained.dataset
  return saved_model.ModelCardInfo(
    name=os.path.basename(os.path.abspath(run.model_dir)),
    step=step,
    checkpoint=trained.checkpoint,
    config_hash=run.config.hash,
    input_shape=tuple(dataset.decoder.shape),
    is_image=hasattr(dataset.decoder, "decode_files"),
    embedding_size=trained.encoder.embedding_size,
    data={
      **dataset.index.fingerprint(),
      "training classes": len(dataset.train_classes),
      "evaluation classes": len(dataset.evaluation_classes),
    },
  )
