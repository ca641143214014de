"""The vectors of all candidates in one matrix, for one matrix product with them.

Shapes: C candidates, of which F are fixed, D dimensions.
"""

from __future__ import annotations

from typing import Optional

import tensorflow as tf

from trainer.losses.distances import Comparison, squared_norms

# Numbers from which it pays to compile; as of pairs.
_MIN_NUMBERS_TO_COMPILE = 2**16


def in_one(
  vectors: tf.Tensor,
  fixed: Optional[tf.Tensor],
  comparison: Comparison,
  offset: Optional[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
  """Vectors, those that are fixed last, and their squared norms.

  Args:
    vectors: [C − F, D], of the first candidates, less the offset.
    fixed: [F, D] float, embeddings of the last ones; None where there are none.
    comparison: makes vectors of embeddings, and says whether norms are needed.
    offset: [D], is subtracted from the fixed vectors; None for none.

  Returns:
    [C, D] vectors, and [C] squared norms: 0 where they are not needed.
  """
  if fixed is None:
    return vectors, _norms(vectors, comparison)
  size = fixed.shape.num_elements()
  is_large = size is not None and size >= _MIN_NUMBERS_TO_COMPILE
  join = _compiled_join if is_large else _join
  return join(vectors, fixed, comparison, offset)


def _join(
  vectors: tf.Tensor,
  fixed: tf.Tensor,
  comparison: Comparison,
  offset: Optional[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
  fixed = comparison.vectors_fn(fixed)
  joined = tf.concat([vectors, fixed if offset is None else fixed - offset], 0)
  return joined, _norms(joined, comparison)


# In one pass over what may be far larger than a cache.
_compiled_join = tf.function(_join, jit_compile=True, autograph=False)


def _norms(vectors: tf.Tensor, comparison: Comparison) -> tf.Tensor:
  if comparison.uses_norms:
    return squared_norms(vectors)
  return tf.zeros_like(vectors[:, 0])
