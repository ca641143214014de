"""Random batches of every supported kind.

Shapes: B examples, D dimensions, L labels an example may have.
"""

from __future__ import annotations

import dataclasses
from typing import Optional

import numpy as np
import tensorflow as tf
from hypothesis import strategies

from tests.losses import oracles

_NUM_DIMENSIONS = 5
_NUM_LABELS = 8
# Each size compiles a loss, and each scale has its own constant.
_SIZES = (1, 5, 12)
_SCALES = (1e-4, 1.0, 1e4)
_LABELS = (-(2**31), 1 - 2**31, -1, 0, 2**24, 2**24 + 1, 2**31 - 2, 2**31 - 1)
_WEIGHTS = (0.0, 0.25, 1.0, 1.0, 3.0)
HALVES = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Batch:
  """Inputs of a loss and of its definition.

  Attributes:
    embeddings: [B, D] float32, float16 or bfloat16.
    labels: [B] int32 or [B, L] bool.
    weights: [B] float32, 0 for padding.
    given: [B, B] bool, or None where labels decide.
    unit: of the loss's constant, as norms are.
  """

  embeddings: tf.Tensor
  labels: np.ndarray
  weights: np.ndarray
  given: Optional[np.ndarray]
  unit: float

  @property
  def rounded(self):
    """[B, D] float32, the embeddings without rounding."""
    return tf.cast(self.embeddings, tf.float32)

  @property
  def related(self):
    """[B, B] bool, whether the column is a positive of the row."""
    return oracles.relevance(self.labels) if self.given is None else self.given


@strategies.composite
def batches_for(draw, row, dtypes=("float32", *HALVES)):
  """Returns a strategy of batches for a row of the table."""
  kind = draw(_one_of("classes", "one_class", "all_distinct", "several", "given"))
  size = _SIZES[-1] if kind in ("several", "given") else draw(_one_of(*_SIZES))
  scale = 1.0 if kind in ("several", "given") or size < 12 else draw(_one_of(*_SCALES))
  given = None
  if kind == "given":
    given = np.reshape(draw(_list(strategies.booleans(), size**2)), [size, size])
  return Batch(
    draw(_embeddings(size, _norms(row, size, scale), _one_of(*dtypes))),
    draw(_labels(kind, size)),
    np.float32(draw(_list(_one_of(*_WEIGHTS), size))),
    given,
    row.unit(scale),
  )


def _one_of(*values):
  return strategies.sampled_from(values)


def _list(elements, size, **options):
  return strategies.lists(elements, min_size=size, max_size=size, **options)


def _labels(kind, size):
  if kind == "several":
    few = _one_of(False, False, False, True)
    return _list(_list(few, _NUM_LABELS), size).map(np.array)
  if kind == "one_class":
    return _one_of(*_LABELS).map(lambda label: np.full(size, label, np.int32))
  if kind == "all_distinct":
    return _list(
      strategies.integers(*_LABELS[:: len(_LABELS) - 1]), size, unique=True
    ).map(np.int32)
  return _list(_one_of(*_LABELS), size).map(np.int32)


def _norms(row, size, scale):
  """Returns norms from 1e-4 to 1e4; near the scale if a constant has a unit."""
  is_without_unit = row.unit(10.0) == 1.0
  exponents = strategies.floats(*((-4, 4) if is_without_unit else (-0.3, 0.3)))
  factor = 1.0 if is_without_unit else scale
  return _list(exponents, size).map(lambda drawn: factor * 10.0 ** np.array(drawn))


@strategies.composite
def _embeddings(draw, size, norms, dtypes):
  """Returns vectors of these norms; half of the batches contain duplicates."""
  random = np.random.default_rng(draw(strategies.integers(0, 2**32 - 1)))
  vectors = random.normal(size=(size, _NUM_DIMENSIONS))
  vectors *= (draw(norms) / np.linalg.norm(vectors, axis=1))[:, None]
  if draw(strategies.booleans()):
    vectors = vectors[random.integers(0, size, size)]
  return tf.cast(tf.constant(vectors), draw(dtypes))
