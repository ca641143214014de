"""Sums over all anchors, tile by tile, so that memory holds one tile of pairs.

Shapes: A anchors, T anchors of a tile, C candidates, of which F are fixed, D
dimensions.

A tile's gradient is formed as soon as its value, while its [T, C] matrices are still
in the cache, and kept as the [A, D] and [C − F, D] sums it adds to. So the backward
pass has only to scale them, and nothing of size A × C outlives its tile. One tile that
holds all anchors is the full form: same code, same values.

Between the matrix products of a tile everything is one function of the products. In
large batches XLA compiles it into a few passes over them; in small ones the second that
this takes, on each replica, would not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.losses.accelerator import is_accelerated
from trainer.losses.candidate_vectors import in_one
from trainer.losses.distances import Comparison, common_offset, squared_norms
from trainer.losses.positive_lists import PositiveLists
from trainer.losses.terms import Anchors, Candidates

# Pairs of one tile, without and with an accelerator, when the number of rows is left to
# us. A float32 matrix of the first has 2 MB, about what a core's caches hold; an
# accelerator wants few launches.
_PAIRS_PER_TILE = {False: 2**19, True: 2**24}
# Fewer rows leave the matrix products short of work; but a matrix of more pairs is past
# the 32 MB that malloc keeps: each tile would get new pages of the system, which takes
# as long as the products.
_ENOUGH_ROWS, _MAX_PAIRS, _MIN_ROWS = 128, 5 * 2**20, 32

MIN_PAIRS_TO_COMPILE = 2**16


class Sums(NamedTuple):
  """What is added up over the anchors.

  Attributes:
    total: [] float32, the numerator of the loss; the only one with a gradient.
    num_active: [] float32, terms that are not 0.
    num_terms: [] float32, terms that could be.
  """

  total: tf.Tensor
  num_active: tf.Tensor
  num_terms: tf.Tensor


class Pairs(NamedTuple):
  """Some anchors against all candidates: what their terms are made of.

  Attributes:
    products: [T, C] inner products of the vectors.
    anchor_norms: [T] squared norms of the vectors.
    candidate_norms: [C] squared norms of the vectors.
    anchors: T of them; their embeddings are the vectors.
    candidates: C of them; their embeddings are the vectors.
    lists: positives of the anchors; None where the loss needs none.
  """

  products: tf.Tensor
  anchor_norms: tf.Tensor
  candidate_norms: tf.Tensor
  anchors: Anchors
  candidates: Candidates
  lists: Optional[PositiveLists]


class Slopes(NamedTuple):
  """Gradients of a tile's total.

  Attributes:
    products: [T, C]. Norms count in squared distances alone, ‖a‖² − 2⟨a, c⟩ + ‖c‖², so
      that their gradients are −½ of the sums of these.
    parameters: one for each parameter.
  """

  products: tf.Tensor
  parameters: Sequence[tf.Tensor]


PairsFn = Callable[[Pairs, Sequence[tf.Tensor]], tuple[Sums, Slopes]]


def sum_over_tiles(
  pairs_fn: PairsFn,
  anchors: Anchors,
  candidates: Candidates,
  lists: Optional[PositiveLists],
  *,
  comparison: Comparison,
  parameters: Sequence[tf.Tensor] = (),
  rows_per_tile: Optional[int] = None,
) -> Sums:
  """The sum of what `pairs_fn` returns for each tile of anchors.

  Args:
    pairs_fn: sums and slopes of a tile; an anchor of weight 0 must add nothing.
    anchors: A of them, with vectors for embeddings; a static number, or else one tile
      is made of all.
    candidates: C of them, with vectors for embeddings, but where they are fixed; those
      get no gradient, which takes no time then.
    lists: positives of the anchors, if the loss needs them.
    comparison: makes vectors of embeddings, and says whether norms count.
    parameters: further tensors that the total has a gradient to.
    rows_per_tile: T; None to choose by the number of candidates and the device.
  """
  num_rows = _num_rows(anchors, candidates, rows_per_tile)

  @tf.custom_gradient
  def sums(
    vectors: tf.Tensor, candidate_vectors: tf.Tensor, *parameters: tf.Tensor
  ) -> tuple[tuple[tf.Tensor, ...], Callable]:
    # An outer tape must not record the tiles: it would keep all of them.
    vectors, fresh = tf.stop_gradient(vectors), tf.stop_gradient(candidate_vectors)
    fixed, offset = candidates.fixed_embeddings, None
    if comparison.uses_norms:
      # Distances don't depend on it, so that it has no part in the gradient.
      offset = common_offset(fresh, candidates.is_valid[: fresh.shape[0]])
      vectors, fresh = vectors - offset, fresh - offset
    joined, norms = in_one(fresh, fixed, comparison, offset)
    tiles = _Tiles(
      pairs_fn,
      anchors._replace(embeddings=vectors),
      candidates._replace(embeddings=joined, fixed_embeddings=None),
      norms,
      None if fixed is None else fresh.shape[0],
      lists,
      comparison.uses_norms,
      [tf.stop_gradient(parameter) for parameter in parameters],
    )
    values, gradients = tiles.whole() if num_rows is None else tiles.loop(num_rows)

    def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
      return [tf.cast(upstream, each.dtype) * each for each in gradients]

    return tuple(values), gradient

  return Sums(*sums(anchors.embeddings, candidates.embeddings, *parameters))


def num_pairs(anchors: Anchors, candidates: Candidates) -> Optional[int]:
  """A × C; None where it is not known when the step is traced."""
  num_anchors, num_candidates = anchors.labels.shape[0], candidates.labels.shape[0]
  if num_anchors is None or num_candidates is None:
    return None
  return num_anchors * num_candidates


def _num_rows(
  anchors: Anchors, candidates: Candidates, rows_per_tile: Optional[int]
) -> Optional[int]:
  """T, or None where one tile holds all anchors."""
  if num_pairs(anchors, candidates) is None:
    return None
  if rows_per_tile is None:
    pairs_per_tile = _PAIRS_PER_TILE[is_accelerated()]
    num_candidates = max(1, candidates.labels.shape[0])
    enough = min(_ENOUGH_ROWS, max(_MIN_ROWS, _MAX_PAIRS // num_candidates))
    rows_per_tile = max(enough, pairs_per_tile // num_candidates)
  num_anchors = anchors.labels.shape[0]
  num_tiles = -(-num_anchors // rows_per_tile)
  # Equally many in each: padding is computed too.
  return -(-num_anchors // num_tiles) if num_tiles > 1 else None


class _Tiles(NamedTuple):
  """The sums and the gradients of any part of the anchors.

  Candidates after the first `num_fresh` are fixed; it is None where none are.
  """

  pairs_fn: PairsFn
  anchors: Anchors
  candidates: Candidates
  candidate_norms: tf.Tensor
  num_fresh: Optional[int]
  lists: Optional[PositiveLists]
  uses_norms: bool
  parameters: Sequence[tf.Tensor]

  def whole(self) -> tuple[Sums, list[tf.Tensor]]:
    """The sums, and gradients to anchors, candidates and parameters, of all."""
    sums, to_anchors, slopes = self._tile(self.anchors, self.candidates, self.lists)
    to_candidates = self._with_norms(slopes[0], slopes[1], self._fresh)
    return sums, [to_anchors, to_candidates, *slopes[2:]]

  def loop(self, num_rows: int) -> tuple[Sums, list[tf.Tensor]]:
    """The same, `num_rows` anchors at a time."""
    num_anchors, num_dimensions = self.anchors.embeddings.shape
    num_tiles = -(-num_anchors // num_rows)
    fresh = self._fresh

    def body(index, sums, shared, to_anchors):  # type: ignore[no-untyped-def]
      numbers = index * num_rows + tf.range(num_rows)
      values, to_rows, slopes = self._tile(*self._rows(numbers))
      return (
        index + 1,
        Sums(*(old + new for old, new in zip(sums, values))),
        [old + new for old, new in zip(shared, slopes)],
        to_anchors.write(index, to_rows),
      )

    shared = [tf.zeros_like(each) for each in (fresh, fresh[:, 0], *self.parameters)]
    gradients = tf.TensorArray(
      fresh.dtype, num_tiles, element_shape=[num_rows, num_dimensions]
    )
    _, sums, shared, gradients = tf.while_loop(
      lambda index, *_: index < num_tiles,
      body,
      (tf.constant(0), Sums(*(tf.zeros([]) for _ in Sums._fields)), shared, gradients),
      parallel_iterations=2,  # The products of one while another's terms are summed.
      maximum_iterations=num_tiles,
    )
    to_candidates = self._with_norms(shared[0], shared[1], fresh)
    return sums, [gradients.concat()[:num_anchors], to_candidates, *shared[2:]]

  def _tile(
    self,
    anchors: Anchors,
    candidates: Candidates,
    lists: Optional[PositiveLists],
  ) -> tuple[Sums, tf.Tensor, list[tf.Tensor]]:
    """Of some anchors: sums, gradient to their vectors [T, D], and shared slopes.

    Those are the slopes' products with the anchors [C − F, D], their sums [C − F], and
    the gradients to the parameters.
    """
    vectors, others = anchors.embeddings, candidates.embeddings
    norms = squared_norms(vectors)
    products = tf.matmul(vectors, others, transpose_b=True)
    sums, slopes = self.pairs_fn(
      Pairs(products, norms, self.candidate_norms, anchors, candidates, lists),
      self.parameters,
    )
    slope = slopes.products
    to_anchors = self._with_norms(
      tf.matmul(slope, others), tf.reduce_sum(slope, 1), vectors
    )
    to_fresh = slope[:, : self.num_fresh]
    to_candidates = tf.matmul(to_fresh, vectors, transpose_a=True)
    return (
      sums,
      to_anchors,
      [to_candidates, tf.reduce_sum(to_fresh, 0), *slopes.parameters],
    )

  @property
  def _fresh(self) -> tf.Tensor:
    """[C − F, D], the candidates' vectors that a gradient is wanted to."""
    return self.candidates.embeddings[: self.num_fresh]

  def _with_norms(
    self, by_products: tf.Tensor, slope_sums: tf.Tensor, vectors: tf.Tensor
  ) -> tf.Tensor:
    """A gradient by the products, and by the vectors' own norms where they count."""
    return (
      by_products - slope_sums[:, None] * vectors if self.uses_norms else by_products
    )

  def _rows(
    self, numbers: tf.Tensor
  ) -> tuple[Anchors, Candidates, Optional[PositiveLists]]:
    """The anchors with these numbers, [T]; past the last is padding."""
    last = self.anchors.weights.shape[0] - 1
    is_padding = numbers > last
    numbers = tf.minimum(numbers, last)
    anchors = Anchors(*(tf.gather(each, numbers) for each in self.anchors))
    anchors = anchors._replace(weights=tf.where(is_padding, 0.0, anchors.weights))
    lists = None if self.lists is None else self.lists.rows(numbers)
    return anchors, self.candidates.of_anchors(numbers), lists
