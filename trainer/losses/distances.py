"""Distances and similarities, from inner products and norms.

The Gram form ‖a‖² − 2⟨a, c⟩ + ‖c‖² takes one matrix product and subtracts nearly equal
numbers. In float32 a squared distance has an error of up to about 5 ulp of ‖a‖² + ‖c‖².
The common offset of the candidates is subtracted first, so these are the norms of the
remainders, about the spread of the batch. A pair below that error counts as a
duplicate: its distance is exactly 0 with gradient 0, for every split of the batch over
replicas.

This does not hold for products in TensorFloat-32, which GPUs may use instead of
float32; `make_strategy` turns it off. The exact distances compute products in float64,
whose error is 5e8 times smaller.

Shapes: A anchors, C candidates, N vectors, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.errors import UserError

# Number of vectors from which mean and spread are estimated.
_NUM_SAMPLED = 64
# Units below the last place of a mean have no effect; float32 has no normal numbers
# below the second.
_LAST_PLACE, _SMALLEST_NORMAL = 2.0**-22, 2.0**-126
# The exponent bits of a float32.
_EXPONENT_BITS = 0x7F800000
# Eight ulp of ‖a‖² + ‖c‖² ≈ 2‖a‖²; the largest seen for 8 to 2,048 dimensions is five.
_DUPLICATE_ULPS = 2 * 8
_ULP = {tf.float32: 2.0**-23, tf.float64: 2.0**-52}


class PairwiseMetric(NamedTuple):
  """A comparison of embeddings, split so that the matrix product is separate.

  Attributes:
    vectors_fn: converts embeddings [N, D] float to the vectors that are multiplied.
    compare_fn: converts products [A, C], squared norms of anchors [A] and of candidates
      [C] to distances or similarities [A, C] float32.
    uses_norms: whether squared distances are compared rather than products alone.
    distance_fn: converts the compared values to distances: larger is farther.
  """

  vectors_fn: Callable[[tf.Tensor], tf.Tensor]
  compare_fn: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
  uses_norms: bool
  distance_fn: Callable[[tf.Tensor], tf.Tensor] = tf.identity

  def __call__(self, anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
    """Compares all anchors with all candidates.

    Args:
      anchors: [A, D] float.
      candidates: [C, D] float.

    Returns:
      [A, C] float32.
    """
    left, right = self.vectors_fn(anchors), self.vectors_fn(candidates)
    if self.uses_norms:
      offset = common_offset(right)
      left, right = left - offset, right - offset
    products = tf.matmul(left, right, transpose_b=True)
    return self.compare_fn(products, squared_norms(left), squared_norms(right))


def common_offset(
  vectors: tf.Tensor, is_counted: Optional[tf.Tensor] = None
) -> tf.Tensor:
  """Returns approximately the mean of some vectors; distances do not depend on it.

  Each dimension is rounded to a power of 2 of about the size of the spread: vectors
  around zero, or on a grid, stay unchanged. If there are many vectors, only a sample is
  used.

  Args:
    vectors: [N, D] float.
    is_counted: [N] bool, false for padding, whose vectors are 0; None for all.

  Returns:
    [D] in the type of the vectors, without gradient; 0 if all vectors are padding.
  """
  step = max(1, (vectors.shape[0] or 0) // _NUM_SAMPLED)
  fixed = tf.cast(tf.stop_gradient(vectors[::step]), tf.float32)
  weights = tf.ones_like(fixed[None, :, 0])
  if is_counted is not None:
    weights = tf.cast(is_counted[None, ::step], tf.float32)
  weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
  mean = tf.matmul(weights, fixed)
  spread = tf.matmul(weights, tf.abs(fixed - mean))
  least = tf.maximum(_LAST_PLACE * tf.abs(mean), _SMALLEST_NORMAL)
  bits = tf.bitcast(tf.maximum(spread, least), tf.int32)
  unit = tf.bitcast(tf.bitwise.bitwise_and(bits, _EXPONENT_BITS), tf.float32)
  return tf.cast(tf.round(mean / unit) * unit, vectors.dtype)[0]


def squared_norms(vectors: tf.Tensor) -> tf.Tensor:
  """Computes the squared Euclidean norm of each row, [N] of [N, D]."""
  return tf.reduce_sum(tf.square(vectors), 1)


def _float32(embeddings: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.convert_to_tensor(embeddings), tf.float32)


def _float64(embeddings: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.convert_to_tensor(embeddings), tf.float64)


def _unit(embeddings: tf.Tensor) -> tf.Tensor:
  """Scales rows to norm 1; one of a norm below 1e-6 becomes 0, with gradient 0."""
  vectors = _float32(embeddings)
  squared = squared_norms(vectors)[:, None]
  is_zero = squared < 1e-12
  inverse = tf.math.rsqrt(tf.where(is_zero, 1.0, squared))
  return tf.where(is_zero, 0.0, vectors * inverse)


def _squared(
  products: tf.Tensor, anchor_norms: tf.Tensor, candidate_norms: tf.Tensor
) -> tf.Tensor:
  """Computes squared distances [A, C] in the products' type; 0 for duplicates."""
  squared = anchor_norms[:, None] - 2.0 * products + candidate_norms[None, :]
  bound = _DUPLICATE_ULPS * _ULP[products.dtype] * anchor_norms[:, None]
  return tf.where(squared <= bound, tf.zeros_like(squared), squared)


def _compare_squared(
  products: tf.Tensor, anchor_norms: tf.Tensor, candidate_norms: tf.Tensor
) -> tf.Tensor:
  return tf.cast(_squared(products, anchor_norms, candidate_norms), tf.float32)


def _compare_euclidean(
  products: tf.Tensor, anchor_norms: tf.Tensor, candidate_norms: tf.Tensor
) -> tf.Tensor:
  squared = _squared(products, anchor_norms, candidate_norms)
  is_apart = squared > 0.0
  # Mask inside as well: the root's gradient at 0 is infinite, and 0 times it is NaN.
  roots = tf.sqrt(tf.where(is_apart, squared, tf.ones_like(squared)))
  return tf.cast(tf.where(is_apart, roots, tf.zeros_like(roots)), tf.float32)


def _compare_product(
  products: tf.Tensor, anchor_norms: tf.Tensor, candidate_norms: tf.Tensor
) -> tf.Tensor:
  del anchor_norms, candidate_norms
  return products


def _compare_cosine(
  products: tf.Tensor, anchor_norms: tf.Tensor, candidate_norms: tf.Tensor
) -> tf.Tensor:
  del anchor_norms, candidate_norms
  return 1.0 - products


euclidean = PairwiseMetric(_float32, _compare_euclidean, uses_norms=True)
squared_euclidean = PairwiseMetric(_float32, _compare_squared, uses_norms=True)
# Euclidean distance of the vectors scaled to norm 1.
normalized_euclidean = PairwiseMetric(_unit, _compare_euclidean, uses_norms=True)
exact_euclidean = PairwiseMetric(_float64, _compare_euclidean, uses_norms=True)
exact_squared_euclidean = PairwiseMetric(_float64, _compare_squared, uses_norms=True)
# One minus the cosine similarity; 1 where a vector is zero.
cosine = PairwiseMetric(_unit, _compare_cosine, uses_norms=False)
cosine_similarity = PairwiseMetric(
  _unit, _compare_product, uses_norms=False, distance_fn=lambda s: 1.0 - s
)
inner_product = PairwiseMetric(
  _float32, _compare_product, uses_norms=False, distance_fn=tf.negative
)

DISTANCES: Mapping[str, PairwiseMetric] = {
  "euclidean": euclidean,
  "squared_euclidean": squared_euclidean,
  "normalized_euclidean": normalized_euclidean,
  "exact_euclidean": exact_euclidean,
  "exact_squared_euclidean": exact_squared_euclidean,
  "cosine": cosine,
}


def distance_named(name: str) -> PairwiseMetric:
  """Returns the distance of that name.

  Raises:
    UserError: no distance has that name.
  """
  if name not in DISTANCES:
    raise UserError(f"distance={name!r} is unknown; use one of {sorted(DISTANCES)}.")
  return DISTANCES[name]


def pairwise_distances(embeddings: tf.Tensor, squared: bool = False) -> tf.Tensor:
  """Distances between all embeddings of one batch, [C, C] float32, diagonal 0.

  Args:
    embeddings: [C, D] float.
    squared: whether to return squared instead of Euclidean distances.
  """
  return (squared_euclidean if squared else euclidean)(embeddings, embeddings)
