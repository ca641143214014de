"""The features of one serialized `tf.train.Example`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainer.errors import UserError


def values(record: bytes, name: str) -> dict[str, list[Any]]:
  """The values of each feature that has any.

  Args:
    record: serialized example.
    name: of the record, for the message.

  Returns:
    Bytes, integers or floats by the feature's name.

  Raises:
    UserError: it is no example.
  """
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception as error:  # protobuf has its own.
    raise UserError(f"{name} is no tf.train.Example.") from error
  lists = {key: feature.WhichOneof("kind") for key, feature in features.items()}
  return {
    key: list(getattr(features[key], kind).value) for key, kind in lists.items() if kind
  }


def text(value: Any) -> Any:
  """Bytes as text, whatever they hold; all else as it is."""
  return value.decode(errors="replace") if isinstance(value, bytes) else value
