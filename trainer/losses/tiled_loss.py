"""Pair losses computed tile by tile, so that memory holds one tile of pairs.

A tile's gradient is computed together with its value, while its [T, C] matrices are
still in the cache. It is added to sums of size [A, D] and [C − F, D]. The backward pass
only scales these sums, and nothing of size A × C outlives its tile. One tile that holds
all anchors is the full form: same code, same values.

Everything between the matrix products of a tile is one function of the products. For
large batches XLA compiles it into a few passes over them. Small batches are not
compiled: compilation costs about 1 s per replica.

Shapes: A anchors, T anchors of a tile, C candidates, of which F are fixed, D
dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import PairwiseMetric, common_offset, squared_norms
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.loss_terms import (
  Anchors,
  Candidates,
  LossOutput,
  PairMasks,
  PositiveLists,
  WeightedMean,
  check_batch,
  lists_of_pairs,
  pair_masks,
  positive_lists,
)

# Not empty while a function is traced for another machine with an accelerator.
_traced_for_accelerator: list[bool] = []
# Numbers from which compilation pays off, as for pairs.
_MIN_NUMBERS_TO_COMPILE = 2**16
# Pairs of one tile, without and with an accelerator, if the number of rows is not
# given. A float32 matrix of the first has 2 MB, about the cache of a core; accelerators
# need few launches.
_PAIRS_PER_TILE = {False: 2**19, True: 2**24}
# With fewer rows the matrix products are inefficient. A matrix of more pairs exceeds
# the 32 MB that malloc keeps. Each tile would then get new pages from the system, which
# takes as long as the products.
_ENOUGH_ROWS, _MAX_PAIRS, _MIN_ROWS = 128, 5 * 2**20, 32

MIN_PAIRS_TO_COMPILE = 2**16


@contextlib.contextmanager
def for_accelerator() -> Iterator[None]:
  """Traces functions in this context as on a machine with an accelerator.

  Yields:
    Nothing.
  """
  _traced_for_accelerator.append(True)
  try:
    yield
  finally:
    _traced_for_accelerator.pop()


def is_accelerated() -> bool:
  """Returns whether the traced function is for a machine with an accelerator."""
  if _traced_for_accelerator:
    return True
  return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def join_vectors(
  vectors: tf.Tensor,
  fixed: Optional[tf.Tensor],
  comparison: PairwiseMetric,
  offset: Optional[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
  """Joins vectors, the fixed ones last, and computes their squared norms.

  Args:
    vectors: [C − F, D], of the first candidates, less the offset.
    fixed: [F, D] float, embeddings of the last ones; None if there are none.
    comparison: converts embeddings to vectors; its `uses_norms` is read.
    offset: [D], is subtracted from the fixed vectors; None for none.

  Returns:
    [C, D] vectors, and [C] squared norms, 0 if they are not needed.
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
  comparison: PairwiseMetric,
  offset: Optional[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
  fixed = comparison.vectors_fn(fixed)
  joined = tf.concat([vectors, fixed if offset is None else fixed - offset], 0)
  return joined, _norms(joined, comparison)


# A single pass over data that may be far larger than a cache.
_compiled_join = tf.function(_join, jit_compile=True, autograph=False)


def _norms(vectors: tf.Tensor, comparison: PairwiseMetric) -> tf.Tensor:
  if comparison.uses_norms:
    return squared_norms(vectors)
  return tf.zeros_like(vectors[:, 0])


class Sums(NamedTuple):
  """Sums over the anchors.

  Attributes:
    total: [] float32, the numerator of the loss; the only one with a gradient.
    num_active: [] float32, number of nonzero terms.
    num_terms: [] float32, number of possible terms.
  """

  total: tf.Tensor
  num_active: tf.Tensor
  num_terms: tf.Tensor


class Pairs(NamedTuple):
  """Inputs of the terms of some anchors against all candidates.

  Attributes:
    products: [T, C] inner products of the vectors.
    anchor_norms: [T] squared norms of the vectors.
    candidate_norms: [C] squared norms of the vectors.
    anchors: T of them; their embeddings are the vectors.
    candidates: C of them; their embeddings are the vectors.
    lists: positives of the anchors; None if the loss needs none.
  """

  products: tf.Tensor
  anchor_norms: tf.Tensor
  candidate_norms: tf.Tensor
  anchors: Anchors
  candidates: Candidates
  lists: Optional[PositiveLists]


class PairGradients(NamedTuple):
  """Gradients of a tile's total.

  Attributes:
    products: [T, C]. Norms enter only through squared distances, ‖a‖² − 2⟨a, c⟩ + ‖c‖²,
      so their gradients are −½ of the sums of these.
    parameters: one for each parameter.
  """

  products: tf.Tensor
  parameters: Sequence[tf.Tensor]


PairsFn = Callable[[Pairs, Sequence[tf.Tensor]], tuple[Sums, PairGradients]]


def sum_over_tiles(
  pairs_fn: PairsFn,
  anchors: Anchors,
  candidates: Candidates,
  lists: Optional[PositiveLists],
  *,
  comparison: PairwiseMetric,
  needs_lists: bool = False,
  parameters: Sequence[tf.Tensor] = (),
  rows_per_tile: Optional[int] = None,
) -> Sums:
  """Sums the results of `pairs_fn` over all tiles of anchors.

  Args:
    pairs_fn: computes sums and gradients of a tile; an anchor of weight 0 must add
      nothing.
    anchors: A of them, with vectors as embeddings; if A is not static, one tile holds
      all.
    candidates: C of them, with vectors as embeddings except for fixed ones; those have
      no gradient, which saves its time.
    lists: positives of the anchors, if the loss uses them and labels give them.
    comparison: converts embeddings to vectors; its `uses_norms` is read.
    needs_lists: whether each tile makes lists by a sort of its rows if none are given.
    parameters: further tensors that the total has a gradient to.
    rows_per_tile: T; None to choose by the number of candidates and the device.
  """
  num_rows = _num_rows(anchors, candidates, rows_per_tile)

  @tf.custom_gradient
  def sums(
    vectors: tf.Tensor, candidate_vectors: tf.Tensor, *parameters: tf.Tensor
  ) -> tuple[tuple[tf.Tensor, ...], Callable]:
    # An outer tape must not record the tiles, because it would keep all of them.
    vectors, fresh = tf.stop_gradient(vectors), tf.stop_gradient(candidate_vectors)
    fixed, offset = candidates.fixed_embeddings, None
    if comparison.uses_norms:
      # Distances don't depend on the offset, so the gradient does not include it.
      offset = common_offset(fresh, candidates.is_valid[: fresh.shape[0]])
      vectors, fresh = vectors - offset, fresh - offset
    joined, norms = join_vectors(fresh, fixed, comparison, offset)
    tiles = _Tiles(
      pairs_fn,
      anchors._replace(embeddings=vectors),
      candidates._replace(embeddings=joined, fixed_embeddings=None),
      norms,
      None if fixed is None else fresh.shape[0],
      lists,
      needs_lists,
      comparison.uses_norms,
      [tf.stop_gradient(parameter) for parameter in parameters],
    )
    values, gradients = tiles.whole() if num_rows is None else tiles.loop(num_rows)

    def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
      return [tf.cast(upstream, each.dtype) * each for each in gradients]

    return tuple(values), gradient

  return Sums(*sums(anchors.embeddings, candidates.embeddings, *parameters))


def num_pairs(anchors: Anchors, candidates: Candidates) -> Optional[int]:
  """Returns A × C; None if it is not known when the step is traced."""
  num_anchors, num_candidates = anchors.labels.shape[0], candidates.labels.shape[0]
  if num_anchors is None or num_candidates is None:
    return None
  return num_anchors * num_candidates


def _num_rows(
  anchors: Anchors, candidates: Candidates, rows_per_tile: Optional[int]
) -> Optional[int]:
  """Returns T, or None if one tile holds all anchors."""
  if num_pairs(anchors, candidates) is None:
    return None
  if rows_per_tile is None:
    pairs_per_tile = _PAIRS_PER_TILE[is_accelerated()]
    num_candidates = max(1, candidates.labels.shape[0])
    enough = min(_ENOUGH_ROWS, max(_MIN_ROWS, _MAX_PAIRS // num_candidates))
    rows_per_tile = max(enough, pairs_per_tile // num_candidates)
  num_anchors = anchors.labels.shape[0]
  num_tiles = -(-num_anchors // rows_per_tile)
  # Tiles of equal size, because padding is computed too.
  return -(-num_anchors // num_tiles) if num_tiles > 1 else None


class _Tiles(NamedTuple):
  """The anchors and candidates of a batch, to be summed in tiles.

  Candidates after the first `num_fresh` are fixed; it is None if there are none.
  """

  pairs_fn: PairsFn
  anchors: Anchors
  candidates: Candidates
  candidate_norms: tf.Tensor
  num_fresh: Optional[int]
  lists: Optional[PositiveLists]
  needs_lists: bool
  uses_norms: bool
  parameters: Sequence[tf.Tensor]

  def whole(self) -> tuple[Sums, list[tf.Tensor]]:
    """Returns sums, and gradients to anchors, candidates and parameters, of all."""
    sums, to_anchors, slopes = self._tile(self.anchors, self.candidates, self.lists)
    to_candidates = self._with_norms(slopes[0], slopes[1], self._fresh)
    return sums, [to_anchors, to_candidates, *slopes[2:]]

  def loop(self, num_rows: int) -> tuple[Sums, list[tf.Tensor]]:
    """Returns the same, computed `num_rows` anchors at a time."""
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
      parallel_iterations=2,  # Overlaps products with the terms.
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
    """Computes sums, gradient to the anchors' vectors [T, D], and shared gradients.

    With S the gradient to the products, the shared gradients are Sᵀ times the anchors
    [C − F, D], the column sums of S [C − F], and the gradients to the parameters.
    """
    vectors, others = anchors.embeddings, candidates.embeddings
    if self.needs_lists and lists is None:
      lists = lists_of_pairs(pair_masks(anchors, candidates).is_positive)
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
    """The candidates' vectors that need a gradient, [C − F, D]."""
    return self.candidates.embeddings[: self.num_fresh]

  def _with_norms(
    self, by_products: tf.Tensor, slope_sums: tf.Tensor, vectors: tf.Tensor
  ) -> tf.Tensor:
    """Adds the gradient through the vectors' own norms, if they are used."""
    return (
      by_products - slope_sums[:, None] * vectors if self.uses_norms else by_products
    )

  def _rows(
    self, numbers: tf.Tensor
  ) -> tuple[Anchors, Candidates, Optional[PositiveLists]]:
    """Returns the anchors with the given indices, [T]; padding beyond the last."""
    last = self.anchors.weights.shape[0] - 1
    is_padding = numbers > last
    numbers = tf.minimum(numbers, last)
    anchors = Anchors(*(tf.gather(each, numbers) for each in self.anchors))
    anchors = anchors._replace(weights=tf.where(is_padding, 0.0, anchors.weights))
    lists = None if self.lists is None else self.lists.rows(numbers)
    return anchors, self.candidates.of_anchors(numbers), lists


class AnchorTerms(NamedTuple):
  """The terms of each anchor of a tile, before the anchors' weights.

  Attributes:
    total: [T] float32, the sum of the anchor's terms, differentiable.
    num_active: [T] float32, number of its nonzero terms.
    num_terms: [T] float32, number of its terms.
  """

  total: tf.Tensor
  num_active: tf.Tensor
  num_terms: tf.Tensor


def _active(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del weights
  return sums.num_active


def _terms(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del weights
  return sums.num_terms


def _anchors(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del sums
  return tf.reduce_sum(weights)


# Denominators of the sum of all terms.
REDUCTIONS = {"mean_active": _active, "mean_terms": _terms, "mean_anchors": _anchors}


class TiledPairLoss(InBatchLoss):
  """Base of the losses that compare anchors with candidates by tiles and sum the terms.

  Each term of an anchor is multiplied by the anchor's weight, in the sum and in the
  count. A mean without terms is 0 with gradient 0.

  Attributes:
    comparison: how an anchor and a candidate are compared.
    needs_positives: whether a batch without two examples of a class has no loss.
    uses_lists: whether terms are computed positive by positive, if labels give lists.
    needs_lists: whether lists are also used if they need a sort of every row.
  """

  needs_positives = True
  uses_lists = False
  needs_lists = False

  def __init__(
    self,
    *,
    comparison: PairwiseMetric,
    reduction: str,
    rows_per_tile: Optional[int] = None,
  ):
    if reduction not in REDUCTIONS:
      raise UserError(
        f"reduction={reduction!r} is unknown; use one of {sorted(REDUCTIONS)}."
      )
    super().__init__()
    self.comparison = comparison
    self._reduction = reduction
    self._reduction_fn = REDUCTIONS[reduction]
    self._rows_per_tile = rows_per_tile
    # Created once: a function created at each call would be compiled at each call.
    self._compiled_fn = tf.function(
      self._sums_and_gradients, jit_compile=True, autograph=False
    )

  @property
  def margin(self) -> Optional[float]:
    """Margin of its triplets; none here."""
    return None

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes the terms of a tile's anchors.

    Args:
      compared: [T, C] float32, distances or similarities.
      pairs: masks of positives and negatives.
      parameters: the values of `parameters()`.
    """
    raise NotImplementedError

  def parameters(self) -> list[tf.Tensor]:
    """Returns values of the loss's variables that the terms have a gradient to."""
    return []

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes this replica's sum, count and statistics.

    Raises:
      UserError: as in `check_batch`.
    """
    check_batch(anchors, candidates)
    uses_lists = self.uses_lists or self.needs_lists
    lists = positive_lists(anchors, candidates) if uses_lists else None
    # Padding may hold any value, and 0 times NaN is NaN.
    vectors_fn = self.comparison.vectors_fn
    own = _zero_unless(anchors.weights > 0.0, anchors.embeddings)
    fresh = candidates.embeddings
    others = _zero_unless(candidates.is_valid[: fresh.shape[0]], fresh)
    sums = sum_over_tiles(
      self._pairs_fn(anchors, candidates),
      anchors._replace(embeddings=vectors_fn(own)),
      candidates._replace(embeddings=vectors_fn(others)),
      lists,
      comparison=self.comparison,
      needs_lists=self.needs_lists,
      parameters=self.parameters(),
      rows_per_tile=self._rows_per_tile,
    )
    count = tf.stop_gradient(self._reduction_fn(sums, anchors.weights))
    active = WeightedMean(sums.num_active, sums.num_terms)
    return LossOutput(sums.total, count, {"mining/active_fraction": active})

  def _pairs_fn(self, anchors: Anchors, candidates: Candidates) -> PairsFn:
    """Returns the function of a tile, which XLA compiles for a large batch."""
    is_large = (num_pairs(anchors, candidates) or 0) >= MIN_PAIRS_TO_COMPILE
    return self._compiled_fn if is_large else self._sums_and_gradients

  def _sums_and_gradients(
    self, pairs: Pairs, parameters: Sequence[tf.Tensor]
  ) -> tuple[Sums, PairGradients]:
    """Computes the sums of a tile, and the gradients of its total."""
    sources = [pairs.products, *parameters]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(sources)
      compared = self.comparison.compare_fn(
        pairs.products, pairs.anchor_norms, pairs.candidate_norms
      )
      terms = self.anchor_terms(
        compared, pair_masks(pairs.anchors, pairs.candidates, pairs.lists), parameters
      )
      sums = Sums(*(tf.reduce_sum(pairs.anchors.weights * each) for each in terms))
    gradients = tape.gradient(
      sums.total, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    to_products, *to_parameters = gradients
    return sums, PairGradients(to_products, to_parameters)


def _zero_unless(is_real: tf.Tensor, embeddings: tf.Tensor) -> tf.Tensor:
  embeddings = tf.convert_to_tensor(embeddings)
  return tf.where(is_real[:, None], embeddings, tf.zeros_like(embeddings))
