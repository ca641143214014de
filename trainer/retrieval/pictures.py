"""Pictures of records, as the encoder sees them.

Shapes: N records.
"""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np
import tensorflow as tf

from trainer.data.decode import Decoder
from trainer.data.records import RecordIndex

_NUM_ABREAST = 64


def pictures_of(
  index: RecordIndex, decoder: Decoder, record_numbers: np.ndarray
) -> Optional[Callable[[np.ndarray], list[bytes]]]:
  """What gives PNG files of records; None if the inputs are no pictures.

  Args:
    index: where the records are.
    decoder: makes inputs of them.
    record_numbers: [N] int64.

  Returns:
    From positions among the record numbers, [n] int64, to n files.
  """
  shape = decoder.shape
  if len(shape) != 3 or shape[-1] not in (1, 3):
    return None

  def pictures(positions: np.ndarray) -> list[bytes]:
    files: list[bytes] = []
    for start in range(0, len(positions), _NUM_ABREAST):
      numbers = record_numbers[positions[start : start + _NUM_ABREAST]]
      records = tf.constant(index.read(numbers), tf.string)
      inputs = tf.round(tf.clip_by_value(decoder(records), 0.0, 1.0) * 255.0)
      files += [tf.io.encode_png(each).numpy() for each in tf.cast(inputs, tf.uint8)]
    return files

  return pictures
