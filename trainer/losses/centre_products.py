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

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Optional

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.class_centres import CentreRows, num_tiles

# Compilation takes about 1 s; smaller tiles are not compiled.
_MIN_PAIRS_TO_COMPILE = 2**16
_MINUS_INFINITY = -float("inf")
# Marks the own class among exponentials, which are not negative.
_OWN = -1.0
_MIN_SQUARED_NORM = 1e-24


@gin.register
@dataclasses.dataclass(frozen=True)
class ClassFilter:
  """Leaves out other classes that are too near: the example's label is then doubtful.

  Attributes:
    above: cosine above which the centre of another class is left out.
    keeps_zero: whether a class left out keeps a logit of 0, without gradient.

  Raises:
    UserError: the cosine is outside of (−1, 1).
  """

  above: float
  keeps_zero: bool = False

  def __post_init__(self):
    if not -1 < self.above < 1:
      raise UserError(
        f"ClassFilter.above={self.above} is not a cosine between -1 and 1; give one "
        "such as 0.5."
      )


class CosineOptions(NamedTuple):
  """How the centres of other classes are compared.

  Attributes:
    scale: s > 0.
    class_filter: which of them are left out; None for none.
    softness: γ > 0: the cosine with a class is Σ p·c over its k centres, where p is the
      softmax of c/γ; None for the largest c.
  """

  scale: float
  class_filter: Optional[ClassFilter] = None
  softness: Optional[float] = None


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
  options: CosineOptions,
  collectives: Collectives,
) -> CentreCosines:
  """Compares all examples of the global batch with the centres of all replicas.

  Args:
    embeddings: [N, D] float32 of norm 1 (or 0), gathered with gradient.
    rows: the centres that this replica has read.
    options: of the comparison.
    collectives: connect the replicas.

  Returns:
    Differentiable with respect to `embeddings` and `rows.vectors`.
  """
  tiles = _Tiles(rows, options)

  @tf.custom_gradient
  def compare(
    embeddings: tf.Tensor, vectors: tf.Tensor
  ) -> tuple[tuple[tf.Tensor, ...], Callable]:
    embeddings, vectors = tf.stop_gradient(embeddings), tf.stop_gradient(vectors)
    found = tiles.forward(embeddings, vectors)
    of_replica = tf.stack(
      [*_log_sum(found.largest, found.sums), found.own, found.nearest]
    )
    gathered = collectives.gather(of_replica[None])
    tops, sums, owns, nearest = tf.unstack(
      tf.reshape(gathered, [-1, *of_replica.shape]), axis=1
    )
    top, total = _log_sum(tops, sums)
    others = top + tf.math.log(total)

    def gradient(
      to_own: tf.Tensor, to_others: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
      # Each replica's loss has terms of its own examples only.
      to_own, to_others = tf.unstack(collectives.sum(tf.stack([to_own, to_others])))
      shares = tf.exp(found.largest - tf.where(total > 0.0, others, 0.0))
      return tiles.backward(
        embeddings, vectors, found, options.scale * to_others * shares, to_own
      )

    return (tf.reduce_sum(owns, 0), others, tf.reduce_max(nearest, 0)), gradient

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
      class, −1 at the nearest centre of the own class, 0 elsewhere. The cosines if all
      centres of a class count.
    largest: [tiles, N], the largest logit of each tile; −∞ if there is none.
    sums: [tiles, N], of the exponentials.
    own: [N], cosine with the own class; 0 if it is not on this replica.
    nearest: [N], largest cosine with another class; −∞ if there is none.
  """

  values: tf.TensorArray
  largest: tf.Tensor
  sums: tf.Tensor
  own: tf.Tensor
  nearest: tf.Tensor


class _Tiles:
  """The rows of a replica in tiles, each compared with all examples."""

  def __init__(self, rows: CentreRows, options: CosineOptions):
    self._rows = rows
    self._num_tiles = num_tiles(rows.is_used.shape[0])
    self._num_rows = rows.is_used.shape[0] // self._num_tiles
    kind = _TileFunction if options.softness is None else _SoftTileFunction
    function = kind(options, rows.centres_per_class)
    num_pairs = rows.columns.shape[0] * self._num_rows
    self._exponentials_fn = compiled_if_large(function.exponentials, num_pairs)
    self._slopes_fn = function.slopes
    if options.softness is not None:
      self._slopes_fn = compiled_if_large(function.slopes, num_pairs)

  def forward(self, embeddings: tf.Tensor, vectors: tf.Tensor) -> _Exponentials:
    """Computes the exponentials of all rows."""
    num_examples, num_tiles = embeddings.shape[0], self._num_tiles
    num_columns = vectors.shape[0] // num_tiles

    def body(index, own, nearest, *arrays):  # type: ignore[no-untyped-def]
      unit, _ = unit_tile(vectors, index, num_tiles)
      *found, of_own, of_others = self._exponentials_fn(
        tf.matmul(embeddings, unit, transpose_b=True), *self._classes(index)
      )
      written = (array.write(index, each) for array, each in zip(arrays, found))
      return index + 1, own + of_own, tf.maximum(nearest, of_others), *written

    _, own, nearest, values, largest, sums = tf.while_loop(
      lambda index, *_: index < num_tiles,
      body,
      (
        tf.constant(0),
        tf.zeros([num_examples]),
        tf.fill([num_examples], _MINUS_INFINITY),
        *(
          tf.TensorArray(tf.float32, num_tiles, element_shape=shape)
          for shape in ([num_examples, num_columns], [num_examples], [num_examples])
        ),
      ),
      parallel_iterations=2,
      maximum_iterations=num_tiles,
    )
    return _Exponentials(values, largest.stack(), sums.stack(), own, nearest)

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
      unit, inverse_norms = unit_tile(vectors, index, num_tiles)
      slope = self._slopes_fn(
        found.values.read(index),
        *self._classes(index),
        found.largest[index],
        weights[index],
        to_own,
      )
      to_unit = tf.matmul(slope, embeddings, transpose_a=True)
      return (
        index + 1,
        to_embeddings + tf.matmul(slope, unit),
        to_vectors.write(index, to_rows(to_unit, unit, inverse_norms)),
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

  def _classes(self, index: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns own columns [N] in a tile, and is_used and log weights of its rows."""
    first, size = [index * self._num_rows], [self._num_rows]
    classes = [self._rows.columns - first[0], tf.slice(self._rows.is_used, first, size)]
    if self._rows.log_weights is not None:
      classes.append(tf.slice(self._rows.log_weights, first, size))
    return tuple(classes)


def unit_tile(
  vectors: tf.Tensor, index: tf.Tensor, num_tiles: int
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the unit vectors of a tile, and the inverse norms of its rows.

  Args:
    vectors: [S·k, D] float32.
    index: [] int32, of the tile.
    num_tiles: divides S·k.

  Returns:
    [T·k, D] and [T·k, 1], both 0 for rows of 0.
  """
  num_columns = vectors.shape[0] // num_tiles
  tile = tf.slice(vectors, [index * num_columns, 0], [num_columns, vectors.shape[1]])
  squared = tf.reduce_sum(tile**2, 1, keepdims=True)
  is_zero = squared < _MIN_SQUARED_NORM
  inverse = tf.where(is_zero, 0.0, tf.math.rsqrt(tf.where(is_zero, 1.0, squared)))
  return tile * inverse, inverse


def to_rows(to_unit: tf.Tensor, unit: tf.Tensor, inverse_norms: tf.Tensor) -> tf.Tensor:
  """Converts gradients to unit vectors to those to the rows, from `unit_tile`."""
  along = tf.reduce_sum(to_unit * unit, 1, keepdims=True)
  return (to_unit - along * unit) * inverse_norms


def compiled_if_large(function: Callable, num_pairs: int) -> Callable:
  """Returns the function, compiled by XLA if that pays for so many pairs."""
  if num_pairs < _MIN_PAIRS_TO_COMPILE:
    return function
  return tf.function(function, jit_compile=True, autograph=False)


class _TileFunction:
  """The exponentials of a tile from its products, which XLA may compile."""

  def __init__(self, options: CosineOptions, centres_per_class: int):
    self._options = options
    self._centres_per_class = centres_per_class

  def exponentials(
    self,
    products: tf.Tensor,
    columns: tf.Tensor,
    is_used: tf.Tensor,
    log_weights: Optional[tf.Tensor] = None,
  ) -> tuple[tf.Tensor, ...]:
    """Computes values, largest, sums, own and nearest of `_Exponentials` for one tile.

    Args:
      products: [N, T·k] cosines.
      columns: [N] int32, row of the own class; outside 0…T−1 if it is in another tile.
      is_used: [T] bool.
      log_weights: [T] float32; None for 0.
    """
    cosines = self._by_class(products, is_used)
    of_class = self._of_class(cosines)
    is_own = tf.equal(columns[:, None], tf.range(is_used.shape[0])[None, :])
    is_other = is_used[None, :] & ~is_own
    logits, has_slope = self._logits(of_class, is_other, log_weights)
    largest = tf.reduce_max(logits, 1)
    finite = tf.where(largest > _MINUS_INFINITY, largest, 0.0)
    exponentials = tf.exp(logits - finite[:, None])
    sums = tf.reduce_sum(exponentials, 1)
    nearest = tf.reduce_max(tf.where(is_other, of_class, _MINUS_INFINITY), 1)
    if self._options.class_filter is not None:
      exponentials = tf.where(has_slope, exponentials, 0.0)
    own = tf.reduce_sum(tf.where(is_own, of_class, 0.0), 1)
    values = self._values(cosines, exponentials, is_own)
    return tf.reshape(values, products.shape), largest, sums, own, nearest

  def slopes(
    self,
    values: tf.Tensor,
    columns: tf.Tensor,
    is_used: tf.Tensor,
    *rest: tf.Tensor,
  ) -> tf.Tensor:
    """Computes the gradient to the products of a tile, [N, T·k].

    Args:
      values: from `exponentials`.
      columns: as in `exponentials`.
      is_used: as in `exponentials`.
      *rest: log weights, if any; then, of each example, the largest logit of the tile,
        the factor of its exponentials and the gradient to its own cosine, [N] each.
    """
    del columns, is_used
    *_, weights, to_own = rest
    return tf.where(values < 0.0, to_own[:, None], values * weights[:, None])

  def _by_class(self, products: tf.Tensor, is_used: tf.Tensor) -> tf.Tensor:
    shape = [products.shape[0], is_used.shape[0], self._centres_per_class]
    return tf.reshape(products, shape)

  def _of_class(self, cosines: tf.Tensor) -> tf.Tensor:
    """Returns one cosine for each class, [N, T] of [N, T, k]."""
    return tf.reduce_max(cosines, 2)

  def _values(
    self, cosines: tf.Tensor, exponentials: tf.Tensor, is_own: tf.Tensor
  ) -> tf.Tensor:
    """Returns [N, T, k], from which `slopes` computes."""
    values = tf.where(is_own, _OWN, exponentials)[:, :, None]
    if self._centres_per_class > 1:
      values = tf.where(_is_first_largest(cosines), values, 0.0)
    return values

  def _logits(
    self,
    of_class: tf.Tensor,
    is_other: tf.Tensor,
    log_weights: Optional[tf.Tensor],
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the logits of other classes, −∞ if not counted; which have a slope."""
    logits, has_slope = self._options.scale * of_class, is_other
    class_filter = self._options.class_filter
    if class_filter is not None:
      has_slope &= of_class <= class_filter.above
      left_out = 0.0 if class_filter.keeps_zero else _MINUS_INFINITY
      logits = tf.where(has_slope, logits, left_out)
    if log_weights is not None:
      logits += log_weights[None, :]
    return tf.where(is_other, logits, _MINUS_INFINITY), has_slope


class _SoftTileFunction(_TileFunction):
  """All centres of a class count: its cosine is Σ p·c with p the softmax of c/γ."""

  def _of_class(self, cosines: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(self._shares(cosines) * cosines, 2)

  def _shares(self, cosines: tf.Tensor) -> tf.Tensor:
    return tf.nn.softmax(cosines / self._options.softness, 2)

  def _values(
    self, cosines: tf.Tensor, exponentials: tf.Tensor, is_own: tf.Tensor
  ) -> tf.Tensor:
    del exponentials, is_own
    return cosines

  def slopes(
    self,
    values: tf.Tensor,
    columns: tf.Tensor,
    is_used: tf.Tensor,
    *rest: tf.Tensor,
  ) -> tf.Tensor:
    """Computes the gradient from the cosines; see the base class."""
    *log_weights, largest, weights, to_own = rest
    cosines = self._by_class(values, is_used)
    shares = self._shares(cosines)
    of_class = tf.reduce_sum(shares * cosines, 2)
    is_own = tf.equal(columns[:, None], tf.range(is_used.shape[0])[None, :])
    is_other = is_used[None, :] & ~is_own
    logits, has_slope = self._logits(
      of_class, is_other, log_weights[0] if log_weights else None
    )
    finite = tf.where(largest > _MINUS_INFINITY, largest, 0.0)
    exponentials = tf.where(has_slope, tf.exp(logits - finite[:, None]), 0.0)
    to_class = tf.where(is_own, to_own[:, None], exponentials * weights[:, None])
    # The share of a centre rises with its cosine.
    inner = shares * (1.0 + (cosines - of_class[:, :, None]) / self._options.softness)
    return tf.reshape(to_class[:, :, None] * inner, values.shape)


def _is_first_largest(cosines: tf.Tensor) -> tf.Tensor:
  """Returns [N, T, k] bool, true at the first largest number of the last axis."""
  places = tf.range(cosines.shape[2])
  is_largest = tf.equal(cosines, tf.reduce_max(cosines, 2, keepdims=True))
  first = tf.reduce_min(tf.where(is_largest, places, cosines.shape[2]), 2)
  return tf.equal(places, first[:, :, None])
