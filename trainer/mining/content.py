"""What records hold beside their key and label, so that copies are known.

Shapes: N records.
"""

from __future__ import annotations

import hashlib

import numpy as np
import tensorflow as tf

from trainer import heartbeat
from trainer.data.records import RecordIndex
from trainer.errors import UserError

_READ_AT_ONCE = 4_096
_KEY_FEATURE = "key"


def hashes(index: RecordIndex, record_numbers: np.ndarray) -> np.ndarray:
  """A hash of each record's features beside key and label.

  Args:
    index: the records.
    record_numbers: [N] int64.

  Returns:
    [N] uint64; equal where every byte of the content is.

  Raises:
    UserError: a record can't be read, or is no example.
  """
  left_out = (_KEY_FEATURE, index.manifest.label_feature)
  found = np.empty(len(record_numbers), np.uint64)
  for start in range(0, len(found), _READ_AT_ONCE):
    heartbeat.beat()
    numbers = record_numbers[start : start + _READ_AT_ONCE]
    for place, record in enumerate(index.read(numbers), start):
      found[place] = _hash(record, left_out, index, int(record_numbers[place]))
  return found


def _hash(
  record: bytes, left_out: tuple[str, str], index: RecordIndex, number: int
) -> int:
  try:
    example = tf.train.Example.FromString(record)
  except Exception as error:  # protobuf has its own.
    raise UserError(f"{index.describe(number)} is no tf.train.Example.") from error
  for name in left_out:
    example.features.feature.pop(name, None)
  content = example.SerializeToString(deterministic=True)
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
