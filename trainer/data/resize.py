"""Images made smaller once, when they are ingested."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import gin

from trainer.errors import UserError

if TYPE_CHECKING:
  import tensorflow as tf


@gin.register
class Resize:
  """Images made smaller once, at ingest, and kept as PNG or JPEG.

  Args:
    longest_side: pixels; smaller images stay as they are.
    jpeg_quality: 1 … 100; None for PNG, which loses nothing.

  Raises:
    UserError: the side is below 1, or the quality is out of range.
  """

  def __init__(self, *, longest_side: int, jpeg_quality: Optional[int] = None):
    if longest_side < 1:
      raise UserError(f"Resize.longest_side={longest_side} must be at least 1.")
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
      raise UserError(f"Resize.jpeg_quality={jpeg_quality} must be 1 … 100, or None.")
    self._longest_side = longest_side
    self._jpeg_quality = jpeg_quality

  def describe(self) -> dict[str, object]:
    """Its arguments."""
    return {"longest_side": self._longest_side, "jpeg_quality": self._jpeg_quality}

  def __call__(self, image: tf.Tensor) -> Optional[bytes]:
    """[H, W, C] uint8 as a smaller file; None where it is small enough."""
    import tensorflow as tf  # Late: looking at a finished ingest needs none.

    height, width, channels = image.shape
    scale = self._longest_side / max(height, width)
    if scale >= 1:
      return None
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    resized = tf.image.resize(image, size, antialias=True)
    pixels = tf.saturate_cast(tf.round(resized), tf.uint8)
    if self._jpeg_quality is None or channels not in (1, 3):
      return tf.io.encode_png(pixels).numpy()
    return tf.io.encode_jpeg(pixels, quality=self._jpeg_quality).numpy()
