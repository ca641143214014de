"""One picture of several answers: a row a query, the query apart at the left.

Shapes: H × W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

_GAP, _AFTER_QUERY, _MIN_HEIGHT = 2, 10, 48
_WHITE = 255


def png(rows: Sequence[Sequence[Optional[np.ndarray]]]) -> bytes:
  """A PNG file.

  Args:
    rows: of [H, W, C] uint8, all of one shape; None leaves a place empty. Small ones
      are enlarged by whole factors.
  """
  height, width, channels = next(p for row in rows for p in row if p is not None).shape
  factor = max(1, -(-_MIN_HEIGHT // height))
  high, wide = height * factor + _GAP, width * factor + _GAP
  longest = max(map(len, rows))
  shape = [len(rows) * high + _GAP, longest * wide + _GAP + _AFTER_QUERY, channels]
  canvas = np.full(shape, _WHITE, np.uint8)
  for y, row in enumerate(rows):
    for x, picture in enumerate(row):
      if picture is not None:
        top, left = _GAP + y * high, _GAP + x * wide + (_AFTER_QUERY if x else 0)
        enlarged = np.asarray(picture).repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + high - _GAP, left : left + wide - _GAP] = enlarged
  return tf.io.encode_png(canvas).numpy()
