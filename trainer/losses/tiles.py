"""Sums over all anchors, tile by tile, so that memory holds one tile of pairs.

Shapes: A anchors, T anchors of a tile, C candidates, D dimensions.

A tile's gradient is formed as soon as its value, while its [T, C] matrices are still
in the cache, and kept as the [A, D] and [C, D] sums it adds to. So the backward pass
has only to scale them, and nothing of size A × C outlives its tile. One tile that
holds all anchors is the full form: same code, same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.losses.statistics import MiningSums
from trainer.losses.terms import Anchors, Candidates, Ratio

# Pairs of one tile, when the number of rows is left to us: 16 MB a float32 matrix.
PAIRS_PER_TILE = 2**22


class Sums(NamedTuple):
  """What is added up over the anchors.

  Attributes:
    total: [] float32, the numerator of the loss; the only one with a gradient.
    num_active: [] float32, terms that are not 0.
    num_terms: [] float32, terms that could be.
    mining: statistics of the anchors.
  """

  total: tf.Tensor
  num_active: tf.Tensor
  num_terms: tf.Tensor
  mining: MiningSums


_STRUCTURE = Sums(0, 0, 0, MiningSums(Ratio(0, 0), Ratio(0, 0), Ratio(0, 0)))


SumsFn = Callable[[Anchors, Candidates, Sequence[tf.Tensor]], Sums]


def sum_over_tiles(
  sums_fn: SumsFn,
  anchors: Anchors,
  candidates: Candidates,
  parameters: Sequence[tf.Tensor] = (),
  rows_per_tile: Optional[int] = None,
) -> Sums:
  """The sum of what `sums_fn` returns for each tile of anchors.

  Args:
    sums_fn: given some anchors, all candidates and the parameters, returns their sums.
      An anchor of weight 0 must add nothing.
    anchors: A of them; a static number, or else one tile is made of all.
    candidates: C of them.
    parameters: further tensors that the total has a gradient to.
    rows_per_tile: T; None for as many as `PAIRS_PER_TILE` allows.
  """
  num_rows = _num_rows(anchors, candidates, rows_per_tile)

  @tf.custom_gradient
  def sums(
    embeddings: tf.Tensor, candidate_embeddings: tf.Tensor, *parameters: tf.Tensor
  ) -> tuple[tuple[tf.Tensor, ...], Callable]:
    # An outer tape must not record the tiles: it would keep all of them.
    tile = _Tile(
      sums_fn,
      anchors._replace(embeddings=tf.stop_gradient(embeddings)),
      candidates._replace(embeddings=tf.stop_gradient(candidate_embeddings)),
      [tf.stop_gradient(parameter) for parameter in parameters],
    )
    values, gradients = tile.whole() if num_rows is None else _loop(tile, num_rows)

    def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
      return [upstream * each for each in gradients]

    return tuple(tf.nest.flatten(values)), gradient

  flat = sums(anchors.embeddings, candidates.embeddings, *parameters)
  return tf.nest.pack_sequence_as(_STRUCTURE, flat)


def _num_rows(
  anchors: Anchors, candidates: Candidates, rows_per_tile: Optional[int]
) -> Optional[int]:
  """T, or None where one tile holds all anchors."""
  num_anchors = anchors.embeddings.shape[0]
  num_candidates = candidates.embeddings.shape[0]
  if num_anchors is None or num_candidates is None:
    return None
  if rows_per_tile is None:
    rows_per_tile = max(1, PAIRS_PER_TILE // max(1, num_candidates))
  return rows_per_tile if rows_per_tile < num_anchors else None


class _Tile(NamedTuple):
  """The value and the gradients of any part of the anchors."""

  sums_fn: SumsFn
  anchors: Anchors
  candidates: Candidates
  parameters: Sequence[tf.Tensor]

  def whole(self) -> tuple[Sums, list[tf.Tensor]]:
    """The sums, and gradients to anchors, candidates and parameters, of all."""
    return self._sums_and_gradients(self.anchors, self.candidates)

  def rows(self, numbers: tf.Tensor) -> tuple[Sums, list[tf.Tensor]]:
    """The same of the anchors with these numbers, [T]; past the last is padding."""
    last = self.anchors.weights.shape[0] - 1
    is_padding = numbers > last
    numbers = tf.minimum(numbers, last)
    anchors = Anchors(*(tf.gather(each, numbers) for each in self.anchors))
    candidates = self.candidates._replace(
      positions=tf.gather(self.candidates.positions, numbers)
    )
    if candidates.is_relevant is not None:
      candidates = candidates._replace(
        is_relevant=tf.gather(candidates.is_relevant, numbers)
      )
    weights = tf.where(is_padding, 0.0, anchors.weights)
    return self._sums_and_gradients(anchors._replace(weights=weights), candidates)

  def _sums_and_gradients(
    self, anchors: Anchors, candidates: Candidates
  ) -> tuple[Sums, list[tf.Tensor]]:
    sources = [anchors.embeddings, candidates.embeddings, *self.parameters]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(sources)
      sums = self.sums_fn(anchors, candidates, self.parameters)
    gradients = tape.gradient(
      sums.total, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    return sums, gradients


def _loop(tile: _Tile, num_rows: int) -> tuple[Sums, list[tf.Tensor]]:
  """The sums and gradients of all anchors, `num_rows` at a time."""
  num_anchors, num_dimensions = tile.anchors.embeddings.shape
  num_tiles = -(-num_anchors // num_rows)

  def body(index, sums, shared, to_anchors):  # type: ignore[no-untyped-def]
    numbers = index * num_rows + tf.range(num_rows)
    values, (to_rows, *to_shared) = tile.rows(numbers)
    return (
      index + 1,
      [old + new for old, new in zip(sums, tf.nest.flatten(values))],
      [old + new for old, new in zip(shared, to_shared)],
      to_anchors.write(index, to_rows),
    )

  shared = [tile.candidates.embeddings, *tile.parameters]
  _, sums, shared, to_anchors = tf.while_loop(
    lambda index, *_: index < num_tiles,
    body,
    (
      tf.constant(0),
      [tf.zeros([]) for _ in tf.nest.flatten(_STRUCTURE)],
      [tf.zeros_like(each) for each in shared],
      tf.TensorArray(tf.float32, num_tiles, element_shape=[num_rows, num_dimensions]),
    ),
    parallel_iterations=1,
    maximum_iterations=num_tiles,
  )
  values = tf.nest.pack_sequence_as(_STRUCTURE, sums)
  return values, [to_anchors.concat()[:num_anchors], *shared]
