"""What embeddings were made of, so that others are not compared with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.records import RecordIndex
from trainer.errors import UserError

# What reaches these makes embeddings of records, beside the weights.
_MODEL = ("evaluate.encoder", "evaluate.dataset.decoder")


def of_encoder(
  encoder: tf.keras.Model, values: Mapping[str, str], step: int
) -> dict[str, Any]:
  """What tells one trained encoder from another, by name.

  Args:
    encoder: restored.
    values: of the config, by path.
    step: number of steps it was trained.
  """
  model, weights = hashlib.sha256(), hashlib.sha256()
  for path, value in sorted(values.items()):
    if path.startswith(_MODEL):
      model.update(f"{path} = {value}\n".encode())
  strategy = tf.distribute.get_strategy()
  for variable in encoder.variables:
    # Of one replica: the mean of several may differ from each by a rounding error.
    value = strategy.experimental_local_results(variable)[0].numpy()
    weights.update(np.ascontiguousarray(value).tobytes())
  return {
    "step": step,
    "encoder and decoder": model.hexdigest()[:16],
    "weights": weights.hexdigest()[:16],
  }


def check_same_encoder(source: Mapping[str, Any], encoder: Mapping[str, Any]) -> None:
  """Checks that embeddings are of an encoder.

  Args:
    source: of the embeddings.
    encoder: what tells it from others, as `of_encoder` gives it.

  Raises:
    UserError: they are of another; what differs.
  """
  _check_same(source, encoder, "The embeddings are of another encoder than the run's")


def check_same_records(source: Mapping[str, Any], index: RecordIndex) -> None:
  """Checks that embeddings are of the records that are there now.

  Args:
    source: of the embeddings.
    index: the records.

  Raises:
    UserError: they are of others; what differs.
  """
  _check_same(source, index.facts(), "The embeddings are of other records")


def _check_same(source: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
  for name, value in now.items():
    if source.get(name) != value:
      raise UserError(
        f"{what}: {name} was {source.get(name)} and is {value}; run --mode=embed again."
      )
