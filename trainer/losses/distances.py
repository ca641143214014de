"""Distances from anchors to candidates, from one matrix product.

Shapes: A anchors, C candidates, D dimensions.

The Gram form ‖a‖² − 2⟨a, c⟩ + ‖c‖² costs one matrix product and subtracts nearly equal
numbers: in float32 a squared distance carries an error of up to about 5 ulp of
‖a‖² + ‖c‖². What is below that error is taken for a duplicate: its distance is exactly
0, with gradient 0, on every device and for every split of the batch over replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf

from trainer.errors import UserError

# Eight ulp of ‖a‖² + ‖c‖² ≈ 2‖a‖²; five is the most seen for 8 to 2,048 dimensions.
_ROUNDING = 2 * 8 * 2.0**-23

DistanceFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def squared_euclidean(anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
  """Squared Euclidean distance, [A, C] float32; 0 with gradient 0 for duplicates.

  Args:
    anchors: [A, D] float.
    candidates: [C, D] float.
  """
  return _squared_euclidean(_float32(anchors), _float32(candidates))


def euclidean(anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
  """Euclidean distance, [A, C] float32; 0 with gradient 0 for duplicates.

  Args:
    anchors: [A, D] float.
    candidates: [C, D] float.
  """
  return _euclidean(_float32(anchors), _float32(candidates))


def normalized_euclidean(anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
  """Euclidean distance of the vectors scaled to norm 1, [A, C] float32.

  Args:
    anchors: [A, D] float.
    candidates: [C, D] float.
  """
  return _euclidean(_unit(anchors), _unit(candidates))


def cosine(anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
  """One minus the cosine similarity, [A, C] float32; 1 where a vector is zero.

  Args:
    anchors: [A, D] float.
    candidates: [C, D] float.
  """
  return 1.0 - cosine_similarity(anchors, candidates)


def cosine_similarity(anchors: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
  """Cosine similarity, [A, C] float32; 0 with gradient 0 where a vector is zero.

  Args:
    anchors: [A, D] float.
    candidates: [C, D] float.
  """
  return tf.matmul(_unit(anchors), _unit(candidates), transpose_b=True)


DISTANCES: Mapping[str, DistanceFn] = {
  "euclidean": euclidean,
  "squared_euclidean": squared_euclidean,
  "normalized_euclidean": normalized_euclidean,
  "cosine": cosine,
}


def distance_named(name: str) -> DistanceFn:
  """The distance function of that name.

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
    squared: squared instead of Euclidean distances.
  """
  return (squared_euclidean if squared else euclidean)(embeddings, embeddings)


def _float32(embeddings: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.convert_to_tensor(embeddings), tf.float32)


def _unit(embeddings: tf.Tensor) -> tf.Tensor:
  return tf.math.l2_normalize(_float32(embeddings), axis=1, epsilon=1e-30)


def _gram_form(
  anchors: tf.Tensor, candidates: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Squared distances with rounding errors, [A, C], and their bound, [A, 1]."""
  anchor_norms = tf.reduce_sum(tf.square(anchors), 1, keepdims=True)
  candidate_norms = tf.reduce_sum(tf.square(candidates), 1, keepdims=True)
  # The norms ride along as two more dimensions, which saves two [A, C] passes.
  left = [-2.0 * anchors, anchor_norms, tf.ones_like(anchor_norms)]
  right = [candidates, tf.ones_like(candidate_norms), candidate_norms]
  squared = tf.matmul(tf.concat(left, 1), tf.concat(right, 1), transpose_b=True)
  return squared, _ROUNDING * anchor_norms


def _gradients(
  slope: tf.Tensor, anchors: tf.Tensor, candidates: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Σ s (a − c) over candidates and Σ s (c − a) over anchors, for slopes s [A, C]."""
  return (
    _pull(tf.matmul(slope, _with_one(candidates)), anchors),
    _pull(tf.matmul(slope, _with_one(anchors), transpose_a=True), candidates),
  )


def _with_one(embeddings: tf.Tensor) -> tf.Tensor:
  """One more dimension of ones: a product with it gives the row's sum as well."""
  return tf.concat([embeddings, tf.ones_like(embeddings[:, :1])], 1)


def _pull(products: tf.Tensor, embeddings: tf.Tensor) -> tf.Tensor:
  """Σ s (x − y), given x and the products Σ s y and Σ s."""
  return products[:, -1:] * embeddings - products[:, :-1]


@tf.custom_gradient
def _squared_euclidean(
  anchors: tf.Tensor, candidates: tf.Tensor
) -> tuple[tf.Tensor, Callable]:
  squared, bound = _gram_form(anchors, candidates)
  is_duplicate = squared <= bound
  distances = tf.where(is_duplicate, 0.0, squared)

  def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    slope = tf.where(is_duplicate, 0.0, 2.0 * upstream)
    return _gradients(slope, anchors, candidates)

  return distances, gradient


@tf.custom_gradient
def _euclidean(anchors: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, Callable]:
  squared, bound = _gram_form(anchors, candidates)
  # 1 / distance, and 0 where the distance is 0.
  inverse = tf.math.rsqrt(tf.where(squared <= bound, float("inf"), squared))

  def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return _gradients(upstream * inverse, anchors, candidates)

  return squared * inverse, gradient
