"""What inputs are made of, so that copies of a record are known.

Shapes: N records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from trainer import heartbeat
from trainer.data.bad_records import Replacements
from trainer.data.decode import Decoder
from trainer.data.records import RecordIndex
from trainer.errors import UserError

# Records, and of those whether they are bad: that decodes them.
_READ_AT_ONCE, _TRIED_AT_ONCE = 4_096, 256


def features_of(decoder: Decoder) -> Sequence[str]:
  """The names of the features that a decoder makes inputs of.

  Raises:
    UserError: it doesn't say.
  """
  features = getattr(decoder, "features", None)
  if not features:
    raise UserError(
      f"{type(decoder).__name__} needs an attribute `features`, the names of what it "
      "reads of an example: by these, copies of a record are known."
    )
  return features


def hashes(
  index: RecordIndex,
  record_numbers: np.ndarray,
  *,
  features: Sequence[str],
  replacements: Optional[Replacements] = None,
) -> np.ndarray:
  """A hash of each record's features that inputs are made of.

  Args:
    index: the records.
    record_numbers: [N] int64.
    features: their names, as a decoder has them: file names, addresses and other things
      that copies don't share are not among them.
    replacements: of bad records, which are copies of what is put in their place; None
      to refuse them.

  Returns:
    [N] uint64; equal where every byte of those features is.

  Raises:
    UserError: a record can't be read, or is no example.
  """
  found = np.empty(len(record_numbers), np.uint64)
  for start in range(0, len(found), _READ_AT_ONCE):
    heartbeat.beat()
    numbers = record_numbers[start : start + _READ_AT_ONCE]
    if replacements is not None:
      parts = np.array_split(numbers, -(-len(numbers) // _TRIED_AT_ONCE))
      numbers = np.concatenate([replacements.replace(part) for part in parts])
    for place, (number, record) in enumerate(zip(numbers, index.read(numbers)), start):
      found[place] = _hash(record, features, index, int(number))
  return found


def _hash(
  record: bytes, features: Sequence[str], index: RecordIndex, number: int
) -> int:
  try:
    example = tf.train.Example.FromString(record)
  except Exception as error:  # protobuf has its own.
    raise UserError(f"{index.describe(number)} is no tf.train.Example.") from error
  content = tf.train.Example()
  for name in features:
    if name in example.features.feature:
      content.features.feature[name].CopyFrom(example.features.feature[name])
  serialized = content.SerializeToString(deterministic=True)
  return int.from_bytes(hashlib.blake2b(serialized, digest_size=8).digest(), "little")
