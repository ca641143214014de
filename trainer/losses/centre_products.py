"""Cosines of embeddings with class centres, in tiles, over the rows of all replicas.

A loss against class centres needs two numbers for each example: the cosine with the
centre of its own class, and the logarithm of the sum of e^{s·cosine} over all other
centres. Each replica computes both over its own rows and keeps the exponentials. Three
small arrays are then combined over the replicas: the largest logit, the sum of the
exponentials and the cosine with the own class. The backward pass only scales the
exponentials, so that a step takes three matrix products and one exponential a pair.

Shapes: N examples of the global batch, S rows read on this replica, T rows of a tile, k
centres of a class, D dimensions, R replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.losses.class_centres import CentreRows, num_tiles

# Compilation takes about 1 s; smaller tiles are not compiled.
_MIN_PAIRS_TO_COMPILE = 2**16
_MINUS_INFINITY = -float("inf")
# Marks the own class among exponentials, which are not negative.
_OWN = -1.0
_MIN_SQUARED_NORM = 1e-24


class CentreCosines(NamedTuple):
  """Cosines of each example with the centres; equal on all replicas.

  Attributes:
    own: [N] float32, with the nearest centre of its own class; 0 for padding.
    others: [N] float32, log Σ e^{scale · cosine} over the other classes; −∞ if there
      are none.
    nearest_other: [N] float32, the largest cosine with another class, without gradient.
  """

  own: tf.Tensor
  others: tf.Tensor
  nearest_other: tf.Tensor


def centre_cosines(
  embeddings: tf.Tensor,
  rows: CentreRows,
  scale: float,
  collectives: Collectives,
  *,
  ignored_above: Optional[float] = None,
) -> CentreCosines:
  """Compares all examples of the global batch with the centres of all replicas.

  Args:
    embeddings: [N, D] float32 of norm 1 (or 0), gathered with gradient.
    rows: the centres that this replica has read.
    scale: s > 0.
    collectives: connect the replicas.
    ignored_above: cosine above which another class is left out; None for none.

  Returns:
    Differentiable with respect to `embeddings` and `rows.vectors`.
  """
  tiles = _Tiles(rows, scale, ignored_above)

  @tf.custom_gradient
  def compare(
    embeddings: tf.Tensor, vectors: tf.Tensor
  ) -> tuple[tuple[tf.Tensor, ...], Callable]:
    embeddings, vectors = tf.stop_gradient(embeddings), tf.stop_gradient(vectors)
    found = tiles.forward(embeddings, vectors)
    of_replica = tf.stack([*_log_sum(found.largest, found.sums), found.own])
    gathered = collectives.gather(of_replica[None])
    tops, sums, owns = tf.unstack(tf.reshape(gathered, [-1, *of_replica.shape]), axis=1)
    top, total = _log_sum(tops, sums)
    others = top + tf.math.log(total)

    def gradient(
      to_own: tf.Tensor, to_others: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
      # Each replica's loss has terms of its own examples only.
      to_own, to_others = tf.unstack(collectives.sum(tf.stack([to_own, to_others])))
      shares = tf.exp(found.largest - tf.where(total > 0.0, others, 0.0))
      return tiles.backward(
        embeddings, vectors, found, scale * to_others * shares, to_own
      )

    return (tf.reduce_sum(owns, 0), others, top / scale), gradient

  cosines = compare(embeddings, rows.vectors)
  shape = [embeddings.shape[0]]
  return CentreCosines(*(tf.ensure_shape(each, shape) for each in cosines))


def _log_sum(tops: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Adds Σ e^{logit} in the form (top, Σ e^{logit − top}) over the first axis, [N]."""
  top = tf.reduce_max(tops, 0)
  finite = tf.where(top > _MINUS_INFINITY, top, 0.0)
  return top, tf.reduce_sum(sums * tf.exp(tops - finite), 0)


class _Exponentials(NamedTuple):
  """Results of the forward pass on one replica.

  Attributes:
    values: TensorArray of [N, T·k], e^{logit − largest} of the nearest centre of each
      class, −1 at the nearest centre of the own class, 0 elsewhere.
    largest: [tiles, N], the largest logit of each tile; −∞ if there is none.
    sums: [tiles, N], of the exponentials.
    own: [N], cosine with the nearest centre of the own class; 0 if not on this replica.
  """

  values: tf.TensorArray
  largest: tf.Tensor
  sums: tf.Tensor
  own: tf.Tensor


class _Tiles:
  """The rows of a replica in tiles, each compared with all examples."""

  def __init__(self, rows: CentreRows, scale: float, ignored_above: Optional[float]):
    self._rows = rows
    self._num_tiles = num_tiles(rows.is_used.shape[0])
    self._num_rows = rows.is_used.shape[0] // self._num_tiles
    exponentials = _TileFunction(scale, rows.centres_per_class, ignored_above)
    num_pairs = rows.columns.shape[0] * self._num_rows
    self._exponentials_fn = (
      tf.function(exponentials, jit_compile=True, autograph=False)
      if num_pairs >= _MIN_PAIRS_TO_COMPILE
      else exponentials
    )

  def forward(self, embeddings: tf.Tensor, vectors: tf.Tensor) -> _Exponentials:
    """Computes the exponentials of all rows."""
    num_examples, num_tiles = embeddings.shape[0], self._num_tiles
    num_columns = vectors.shape[0] // num_tiles

    def body(index, own, *arrays):  # type: ignore[no-untyped-def]
      unit, _ = self._unit(vectors, index)
      *found, of_own = self._exponentials_fn(
        tf.matmul(embeddings, unit, transpose_b=True),
        self._rows.columns - index * self._num_rows,
        tf.slice(self._rows.is_used, [index * self._num_rows], [self._num_rows]),
      )
      written = (array.write(index, each) for array, each in zip(arrays, found))
      return index + 1, own + of_own, *written

    _, own, values, largest, sums = tf.while_loop(
      lambda index, *_: index < num_tiles,
      body,
      (
        tf.constant(0),
        tf.zeros([num_examples]),
        *(
          tf.TensorArray(tf.float32, num_tiles, element_shape=shape)
          for shape in ([num_examples, num_columns], [num_examples], [num_examples])
        ),
      ),
      parallel_iterations=2,
      maximum_iterations=num_tiles,
    )
    return _Exponentials(values, largest.stack(), sums.stack(), own)

  def backward(
    self,
    embeddings: tf.Tensor,
    vectors: tf.Tensor,
    found: _Exponentials,
    weights: tf.Tensor,
    to_own: tf.Tensor,
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the gradients to embeddings [N, D] and rows [S·k, D].

    Args:
      embeddings: as in `forward`.
      vectors: as in `forward`.
      found: its result.
      weights: [tiles, N], factors of the exponentials.
      to_own: [N], gradient to the cosine with the own class.
    """
    num_tiles = self._num_tiles

    def body(index, to_embeddings, to_vectors):  # type: ignore[no-untyped-def]
      unit, inverse_norms = self._unit(vectors, index)
      values = found.values.read(index)
      slope = tf.where(values < 0.0, to_own[:, None], values * weights[index][:, None])
      to_unit = tf.matmul(slope, embeddings, transpose_a=True)
      along = tf.reduce_sum(to_unit * unit, 1, keepdims=True)
      to_rows = (to_unit - along * unit) * inverse_norms
      return (
        index + 1,
        to_embeddings + tf.matmul(slope, unit),
        to_vectors.write(index, to_rows),
      )

    num_columns = vectors.shape[0] // num_tiles
    array = tf.TensorArray(
      tf.float32, num_tiles, element_shape=[num_columns, vectors.shape[1]]
    )
    _, to_embeddings, to_vectors = tf.while_loop(
      lambda index, *_: index < num_tiles,
      body,
      (tf.constant(0), tf.zeros_like(embeddings), array),
      parallel_iterations=2,
      maximum_iterations=num_tiles,
    )
    return to_embeddings, tf.ensure_shape(to_vectors.concat(), vectors.shape)

  def _unit(self, vectors: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the unit vectors [T·k, D] of a tile, and their inverse norms [T·k, 1]."""
    num_columns = vectors.shape[0] // self._num_tiles
    tile = tf.slice(vectors, [index * num_columns, 0], [num_columns, vectors.shape[1]])
    squared = tf.reduce_sum(tile**2, 1, keepdims=True)
    is_zero = squared < _MIN_SQUARED_NORM
    inverse = tf.where(is_zero, 0.0, tf.math.rsqrt(tf.where(is_zero, 1.0, squared)))
    return tile * inverse, inverse


class _TileFunction:
  """The exponentials of a tile from its products, which XLA may compile."""

  def __init__(
    self, scale: float, centres_per_class: int, ignored_above: Optional[float]
  ):
    self._scale = scale
    self._centres_per_class = centres_per_class
    self._ignored_above = ignored_above

  def __call__(
    self, products: tf.Tensor, columns: tf.Tensor, is_used: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Computes the fields of `_Exponentials` for one tile.

    Args:
      products: [N, T·k] cosines.
      columns: [N] int32, row of the own class; outside 0…T−1 if it is in another tile.
      is_used: [T] bool.
    """
    num_examples, num_rows = products.shape[0], is_used.shape[0]
    cosines = tf.reshape(products, [num_examples, num_rows, self._centres_per_class])
    nearest = tf.reduce_max(cosines, 2)
    is_own = tf.equal(columns[:, None], tf.range(num_rows)[None, :])
    is_counted = is_used[None, :] & ~is_own
    if self._ignored_above is not None:
      is_counted &= nearest <= self._ignored_above
    logits = tf.where(is_counted, self._scale * nearest, _MINUS_INFINITY)
    largest = tf.reduce_max(logits, 1)
    finite = tf.where(largest > _MINUS_INFINITY, largest, 0.0)
    exponentials = tf.exp(logits - finite[:, None])
    values = tf.where(is_own, _OWN, exponentials)[:, :, None]
    if self._centres_per_class > 1:
      values = tf.where(_is_first_largest(cosines), values, 0.0)
    return (
      tf.reshape(values, products.shape),
      largest,
      tf.reduce_sum(exponentials, 1),
      tf.reduce_sum(tf.where(is_own, nearest, 0.0), 1),
    )


def _is_first_largest(cosines: tf.Tensor) -> tf.Tensor:
  """Returns [N, T, k] bool, true at the first largest number of the last axis."""
  places = tf.range(cosines.shape[2])
  is_largest = tf.equal(cosines, tf.reduce_max(cosines, 2, keepdims=True))
  first = tf.reduce_min(tf.where(is_largest, places, cosines.shape[2]), 2)
  return tf.equal(places, first[:, :, None])
