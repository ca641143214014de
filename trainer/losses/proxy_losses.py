"""Losses against class centres beside the softmax: Proxy-Anchor and SoftTriple.

Shapes: N examples of the global batch, A of them on this replica, C classes, S rows
read on this replica, T rows of a tile, k centres of a class, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.centre_losses import (
  CentreExamples,
  ClassCentreLoss,
  centre_examples,
  centre_statistics,
)
from trainer.losses.centre_products import (
  CosineOptions,
  compiled_if_large,
  to_rows,
  unit_tile,
)
from trainer.losses.class_centres import CentreRows, ClassCentres, num_tiles
from trainer.losses.loss_terms import MiningBatch, ReplicaLoss

_MINUS_INFINITY = -float("inf")
# Of the authors' code: keeps the slope of a distance between equal centres finite.
_EPSILON = 1e-5


@gin.register
class SoftTripleLoss(ClassCentreLoss):
  """A softmax over relaxed cosines: all k centres of a class count, the nearer more.

  The cosine with a class is S = Σ p·c over its centres, where p is the softmax of c/γ,
  and φ(S) = S − δ. A regularizer is added to the mean over the examples: τ / (C·k·(k −
  1)) · Σ_classes Σ_{s<t} ‖w_s − w_t‖ of unit vectors, over the C classes read. k is
  `ClassCentres.centres_per_class`, 10 in the paper.

  Source: Qian et al. 2019, https://arxiv.org/abs/1909.05235.

  Args:
    centres: as in the base class.
    scale: λ > 0.
    softness: γ > 0.
    regularization: τ >= 0.
    margin: δ >= 0.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    scale: float = 20.0,
    softness: float = 0.1,
    regularization: float = 0.2,
    margin: float = 0.01,
  ):
    super().__init__(centres=centres, scale=scale)
    are_valid = 0 <= regularization < math.inf and 0 <= margin < math.inf
    if not 0 < softness < math.inf or not are_valid:
      raise UserError(
        f"SoftTripleLoss has softness={softness}, regularization={regularization} and "
        f"margin={margin}; needed are above 0, at least 0 and at least 0."
      )
    self._softness = softness
    self._regularization = regularization
    self._margin = margin
    self._options = CosineOptions(scale, softness=softness)

  def own_cosines(self, cosines: tf.Tensor, examples: CentreExamples) -> tf.Tensor:
    """Returns the cosines with the margin; see the base class."""
    del examples
    return cosines - self._margin

  def replica_loss(
    self, pairs: MiningBatch, rows: Sequence[CentreRows], collectives: Collectives
  ) -> ReplicaLoss:
    """Computes this replica's share of the loss; see the base class."""
    loss = super().replica_loss(pairs, rows, collectives)
    if self._regularization == 0 or rows[0].centres_per_class == 1:
      return loss
    num_classes = collectives.sum(_num_members(rows[0].is_used))
    penalty = self._regularization * _distances_within_classes(rows[0]) / num_classes
    return loss._replace(value=loss.value + penalty)


def _num_members(is_member: tf.Tensor) -> tf.Tensor:
  return tf.reduce_sum(tf.cast(is_member, tf.float32))


def _distances_within_classes(rows: CentreRows) -> tf.Tensor:
  """Returns Σ ‖w_s − w_t‖ / (k·(k − 1)) over pairs s < t of the classes read, []."""
  k = rows.centres_per_class
  unit, _ = unit_tile(rows.vectors, tf.constant(0), 1)
  unit = tf.reshape(unit, [-1, k, unit.shape[1]])
  cosines = tf.matmul(unit, unit, transpose_b=True)
  # Rounding may make a cosine larger than 1.
  distances = tf.sqrt(tf.maximum(2.0 - 2.0 * cosines, 0.0) + _EPSILON)
  is_before = tf.range(k)[:, None] < tf.range(k)[None, :]
  is_pair = rows.is_used[:, None, None] & is_before[None]
  return tf.reduce_sum(tf.where(is_pair, distances, 0.0)) / (k * (k - 1))


@gin.register
class ProxyAnchorLoss(ClassCentreLoss):
  """Each centre is an anchor: its examples are its positives, all others its negatives.

    1/|P₊| Σ_{p∈P₊} log(1 + Σ_{x of p} e^{−α(c(x, p) − δ)})
      + 1/|P| Σ_{p∈P} log(1 + Σ_{x not of p} e^{α(c(x, p) + δ)})

  P are the centres read on all replicas, P₊ those of the batch's classes. An example of
  weight w counts as w examples, and with `ClassCentres.is_corrected` a drawn centre as
  many as its interval has.

  Source: Kim et al. 2020, https://arxiv.org/abs/2003.13911.

  Args:
    centres: with one centre for each class.
    scale: α > 0.
    margin: δ >= 0.

  Raises:
    UserError: an argument is out of its range, or a class has several centres.
  """

  def __init__(
    self, *, centres: ClassCentres, scale: float = 32.0, margin: float = 0.1
  ):
    super().__init__(centres=centres, scale=scale)
    if not 0 <= margin < math.inf:
      raise UserError(f"ProxyAnchorLoss.margin={margin} must be at least 0.")
    if centres.centres_per_class != 1:
      raise UserError(
        "ProxyAnchorLoss has one centre for each class; set "
        f"ClassCentres.centres_per_class = 1, not {centres.centres_per_class}."
      )
    self._margin = margin

  def replica_loss(
    self, pairs: MiningBatch, rows: Sequence[CentreRows], collectives: Collectives
  ) -> ReplicaLoss:
    """Computes the terms of this replica's centres; see the base class."""
    examples = centre_examples(type(self).__name__, pairs)
    weights = collectives.gather(pairs.anchors.weights)
    row_weights = tf.cast(rows[0].is_used, tf.float32)
    if rows[0].log_weights is not None:
      row_weights *= tf.exp(rows[0].log_weights)
    tiles = _AnchorTiles(
      rows[0],
      _AnchorTerms(self._scale, self._margin),
      tf.math.log(weights),
      _Factors(
        tf.math.divide_no_nan(1.0, _num_classes(examples)),
        row_weights / collectives.sum(tf.reduce_sum(row_weights)),
      ),
    )
    value, own, nearest = tiles.loss(examples.unit, rows[0].vectors)
    found = tf.stop_gradient(tf.stack([own, nearest]))
    gathered = tf.reshape(collectives.gather(found), [-1, 2, own.shape[0]])
    own, nearest = tf.reduce_sum(gathered[:, 0], 0), tf.reduce_max(gathered[:, 1], 0)
    return ReplicaLoss(value, centre_statistics(own, nearest, rows[0], pairs))


def _num_classes(examples: CentreExamples) -> tf.Tensor:
  """Counts the classes of the global batch, [] float32."""
  labels = tf.where(examples.is_valid, examples.labels, -1)
  ordered = tf.sort(labels)
  is_new = tf.concat([[True], ordered[1:] != ordered[:-1]], 0)
  return _num_members(is_new & (ordered >= 0))


class _Factors(NamedTuple):
  """Factors of the terms of each row.

  Attributes:
    of_positives: [] float32, 1/|P₊|; 0 if there are none.
    of_negatives: [S] float32, 1/|P|; 0 for rows that are not used.
  """

  of_positives: tf.Tensor
  of_negatives: tf.Tensor


class _AnchorTerms:
  """Terms and slopes of a tile from its products, which XLA may compile."""

  def __init__(self, scale: float, margin: float):
    self._scale = scale
    self._margin = margin

  def __call__(
    self,
    products: tf.Tensor,
    columns: tf.Tensor,
    log_weights: tf.Tensor,
    of_positives: tf.Tensor,
    of_negatives: tf.Tensor,
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Computes a tile's loss [], slopes [N, T], own and nearest cosines [N].

    Args:
      products: [N, T] cosines.
      columns: [N] int32, row of the own class; outside 0…T−1 if it is in another tile.
      log_weights: [N] float32, of the examples; −∞ for padding.
      of_positives: [] float32, factor.
      of_negatives: [T] float32, factors; 0 for rows that are not used.
    """
    is_own = tf.equal(columns[:, None], tf.range(products.shape[1])[None, :])
    is_other = ~is_own & (of_negatives > 0.0)[None, :]
    totals, slopes = [], []
    for is_member, sign, factor in (
      (is_own, -1.0, tf.fill([products.shape[1]], of_positives)),
      (is_other, 1.0, of_negatives),
    ):
      logits = self._scale * (sign * products + self._margin) + log_weights[:, None]
      logits = tf.where(is_member, logits, _MINUS_INFINITY)
      terms = tf.nn.softplus(_log_sum_exp(logits))
      totals.append(tf.reduce_sum(factor * terms))
      # e^logit / (1 + Σ e^logit).
      slopes.append(sign * self._scale * factor * tf.exp(logits - terms))
    own = tf.reduce_sum(tf.where(is_own, products, 0.0), 1)
    nearest = tf.reduce_max(tf.where(is_other, products, _MINUS_INFINITY), 1)
    return totals[0] + totals[1], slopes[0] + slopes[1], own, nearest


def _log_sum_exp(logits: tf.Tensor) -> tf.Tensor:
  """Returns log Σ e^logit over the examples, [T] of [N, T]; very small for none."""
  top = tf.maximum(tf.reduce_max(logits, 0), -1e30)
  sums = tf.reduce_sum(tf.exp(logits - top), 0)
  return top + tf.math.log(tf.where(sums > 0.0, sums, 1.0))


class _AnchorTiles:
  """The rows of a replica in tiles, each an anchor for all examples."""

  def __init__(
    self,
    rows: CentreRows,
    terms: _AnchorTerms,
    log_weights: tf.Tensor,
    factors: _Factors,
  ):
    self._columns = rows.columns
    self._num_tiles = num_tiles(rows.is_used.shape[0])
    self._num_rows = rows.is_used.shape[0] // self._num_tiles
    num_pairs = rows.columns.shape[0] * self._num_rows
    self._terms_fn = compiled_if_large(terms, num_pairs)
    self._log_weights = log_weights
    self._factors = factors

  def loss(
    self, unit: tf.Tensor, vectors: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Computes this replica's loss [], own and nearest cosines [N] over its rows.

    The gradient is computed together with the loss, and only scaled afterwards.

    Args:
      unit: [N, D] float32, the examples, gathered with gradient.
      vectors: [S, D] float32.
    """

    @tf.custom_gradient
    def compute(
      unit: tf.Tensor, vectors: tf.Tensor
    ) -> tuple[tuple[tf.Tensor, ...], Callable]:
      total, own, nearest, *slopes = self._sums(
        tf.stop_gradient(unit), tf.stop_gradient(vectors)
      )

      def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
        return [upstream * each for each in slopes]

      return (total, own, nearest), gradient

    return compute(unit, vectors)

  def _sums(self, unit: tf.Tensor, vectors: tf.Tensor) -> Sequence[tf.Tensor]:
    """Returns the results of `loss`, and its gradients to unit and vectors."""

    def body(index, total, own, nearest, to_unit, to_vectors):  # type: ignore[no-untyped-def]
      rows, inverse_norms = unit_tile(vectors, index, self._num_tiles)
      first = index * self._num_rows
      found, slopes, of_own, of_others = self._terms_fn(
        tf.matmul(unit, rows, transpose_b=True),
        self._columns - first,
        self._log_weights,
        self._factors.of_positives,
        tf.slice(self._factors.of_negatives, [first], [self._num_rows]),
      )
      to_tile = tf.matmul(slopes, unit, transpose_a=True)
      return (
        index + 1,
        total + found,
        own + of_own,
        tf.maximum(nearest, of_others),
        to_unit + tf.matmul(slopes, rows),
        to_vectors.write(index, to_rows(to_tile, rows, inverse_norms)),
      )

    array = tf.TensorArray(
      tf.float32, self._num_tiles, element_shape=[self._num_rows, vectors.shape[1]]
    )
    num_examples = unit.shape[0]
    _, *sums, to_vectors = tf.while_loop(
      lambda index, *_: index < self._num_tiles,
      body,
      (
        tf.constant(0),
        tf.zeros([]),
        tf.zeros([num_examples]),
        tf.fill([num_examples], _MINUS_INFINITY),
        tf.zeros_like(unit),
        array,
      ),
      parallel_iterations=2,
      maximum_iterations=self._num_tiles,
    )
    return *sums, tf.ensure_shape(to_vectors.concat(), vectors.shape)
