"""Random batches against the definition; `--hypothesis-show-statistics` counts them.

The tolerance follows from the definition. What is computed in float32 is the result of
embeddings that differ by a few roundings: it may miss the definition's by ten times
what that moves when coordinates move by 1e-6 of their vector's norm, and by 1e-5 of
the value, 1e-4 of the slope. Where a choice hangs on a tie (semi-hard between
duplicates of two classes, say) the definition jumps, and the result is somewhere in the
jump: these examples are the event "jump".
"""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import tensorflow as tf
from hypothesis import strategies

from tests.losses import batches, definition
from tests.losses.property_batches import HALVES, batches_for
from tests.losses.table import each_loss, each_loss_class

_MOVE = 1e-6
# Step of a difference: smaller than a move, so that no tie lies within it.
_STEP = 1e-7
_LARGEST_HALF = 65504.0
_ULPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}

_settings = hypothesis.settings(
  max_examples=15,
  deadline=None,
  derandomize=os.environ.get("CI") == "true",
  database=None,
  phases=[hypothesis.Phase.generate],
)


@each_loss
@_settings
@hypothesis.given(data=strategies.data())
def test_value_and_slope_of_a_random_batch_equal_the_definition(row, data):
  batch = data.draw(batches_for(row))
  total, count, gradient = _evaluated(row, batch, batch.rounded)
  direction = _moves(batch, 1)
  points = np.float64(batch.rounded)
  values = _defined(row, batch, points, direction)
  moves = [_MOVE * _moves(batch, seed) for seed in (2, 3)]
  moved = [points + sign * move for move in moves for sign in (1, -1)]
  jump = np.max(
    [np.abs(_defined(row, batch, each, direction) - values) for each in moved], axis=0
  )
  if jump[0] > 1e-2 * abs(values[0]):
    hypothesis.event("jump")
  parts = np.float64(gradient) * direction
  # Rounding of a sum of many terms near 0.
  floor = 1e-6 * batch.weights.sum() * len(batch.weights) * min(1.0, batch.unit)
  # The last summand is the rounding error of float64 differences.
  sizes = [*np.abs(values[:2]), 10 * np.abs(parts).sum() + 1e-3 * abs(values[0])]
  errors = np.abs([total - values[0], count - values[1], parts.sum() - values[2]])
  tolerances = 1e-5 * np.array(sizes) + 10 * jump + floor
  assert (errors <= tolerances).all(), (errors, tolerances)


@each_loss_class
@_settings
@hypothesis.given(data=strategies.data())
def test_random_batch_of_half_precision_is_mined_in_float32(row, data):
  batch = data.draw(batches_for(row, HALVES))
  *values, gradient = _evaluated(row, batch, batch.embeddings)
  *expected, slopes = _evaluated(row, batch, batch.rounded)
  np.testing.assert_array_equal(values, expected)
  largest = np.abs(slopes).max()
  if batch.embeddings.dtype == tf.float16 and 4 * largest > _LARGEST_HALF:
    hypothesis.event("gradient beyond float16")
  else:
    ulp = _ULPS[batch.embeddings.dtype.name]
    np.testing.assert_allclose(gradient, slopes, rtol=0, atol=4 * ulp * largest + 1e-7)


def _evaluated(row, batch, embeddings):
  return batches.evaluate(
    row.make(unit=batch.unit),
    embeddings,
    batch.labels,
    batch.weights,
    is_relevant=batch.given,
  )


def _moves(batch, seed):
  """Returns a random move, [B, D], in units of each vector's norm."""
  norms = np.linalg.norm(np.float64(batch.rounded), axis=1, keepdims=True)
  return norms * np.random.default_rng(seed).uniform(-1, 1, batch.rounded.shape)


def _defined(row, batch, points, direction):
  """Returns total, count, and slope of the total along a direction."""
  arguments = (batch.related, batch.weights)
  return np.array(
    [
      *definition.total_and_count(row, points, *arguments, unit=batch.unit),
      definition.slope(row, points, direction, _STEP, *arguments, unit=batch.unit),
    ]
  )
