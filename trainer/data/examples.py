"""The features of one serialized `tf.train.Example`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import UserError

_DTYPES = {"bytes_list": object, "int64_list": np.int64, "float_list": np.float32}


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
  return {key: list(kept) for key, (_, kept) in _lists(record, name).items()}


def arrays(record: bytes, name: str) -> dict[str, np.ndarray]:
  """The values of each feature as an array of the feature's own type.

  Args: as `values`.

  Returns:
    Arrays [n] of int64, float32, or bytes as objects, by the feature's name, also
    of n = 0.

  Raises:
    UserError: it is no example.
  """
  found = {}
  for key, (kind, kept) in _lists(record, name).items():
    found[key] = np.empty(len(kept), _DTYPES[kind])
    found[key][:] = kept
  return found


def _lists(record: bytes, name: str) -> dict[str, tuple[str, Sequence[Any]]]:
  """Kind and values of each feature that has a kind."""
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception as error:  # protobuf has its own.
    raise UserError(f"{name} is no tf.train.Example.") from error
  kinds = {key: feature.WhichOneof("kind") for key, feature in features.items()}
  return {
    key: (kind, getattr(features[key], kind).value)
    for key, kind in kinds.items()
    if kind
  }


def text(value: Any) -> Any:
  """Bytes as text, whatever they hold; all else as it is."""
  return value.decode(errors="replace") if isinstance(value, bytes) else value
