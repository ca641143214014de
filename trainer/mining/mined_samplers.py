"""Samplers of mined triplet groups and of neighbouring classes.

Shapes: S steps. Groups: T groups in a batch, with p positives and n negatives each.
Classes: P classes with K samples each in a batch, H of the P hard; C classes to draw
from, L classes of the data, m neighbours of each, s seeds of neighbourhoods.
"""

from __future__ import annotations

import functools
from typing import Callable, Optional

import gin
import numpy as np

from trainer.data import index_arrays, permutation
from trainer.data.class_sampling import ClassStream, Draws
from trainer.data.samplers import PKSampler
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining.round import Round

# Purposes of hashes, so that each use of a seed differs (1 to 4: trainer.data).
_ANCHORS, _POSITIVES, _NEGATIVES = 5, 6, 7
_BLOCKS = 8


@gin.register
class MinedTripletSampler:
  """Sampler of T groups of a round: a pure function of seed, step and round.

  Each anchor comes once per epoch, and each time continues through its positives and
  negatives where it stopped. If it has fewer than p or n, each is repeated as equally
  often as possible. The anchors of a batch are distinct. A record may be in several
  groups of a batch; the losses then count it as one more example of its class.

  Attributes:
    shape: (T, 1 + p + n).
    group: (p, n), as required by `WithinGroups`.

  Args:
    index: of the records; unused.
    mining_round: a round with examples.
    groups_per_batch: T.
    positives_per_group: p.
    negatives_per_group: n.
    seed: random seed of the order.
    classes: of the records; unused, since a round only has these classes.

  Raises:
    UserError: a number is below 1, or the round has no examples or fewer than T.
  """

  def __init__(
    self,
    index: index_arrays.Classes,
    mining_round: Round,
    *,
    groups_per_batch: int,
    positives_per_group: int = 1,
    negatives_per_group: int,
    seed: int,
    classes: Optional[np.ndarray] = None,
  ):
    del index, classes
    sizes = (groups_per_batch, positives_per_group, negatives_per_group)
    if min(sizes) < 1:
      raise UserError(
        "MinedTripletSampler: groups_per_batch={}, positives_per_group={} and "
        "negatives_per_group={} must each be at least 1.".format(*sizes)
      )
    arrays = mining_round.arrays
    if "anchors" not in arrays:
      raise UserError(
        "The round has no examples for MinedTripletSampler; set Miner.examples = "
        "@ExampleMining()."
      )
    self._anchors = arrays["anchors"]
    self._positives, self._negatives = arrays["positives"], arrays["negatives"]
    if len(self._anchors) < groups_per_batch:
      raise TooFewExamplesError(
        f"MinedTripletSampler.groups_per_batch={groups_per_batch} exceeds the "
        f"{len(self._anchors)} anchors of the round; lower it, or mine in a wider "
        "window."
      )
    self._num_groups = groups_per_batch
    self._num_positives = positives_per_group
    self._num_negatives = negatives_per_group
    self._seed = int(permutation.mix(seed, mining_round.step)[0])
    self.shape = (groups_per_batch, 1 + positives_per_group + negatives_per_group)
    self.group = (positives_per_group, negatives_per_group)

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [T, 1 + p + n] int64."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, as [S, T, 1 + p + n] int64."""
    num_anchors = len(self._anchors)
    sizes = np.full(steps.shape, num_anchors)
    keys = np.broadcast_to(permutation.mix(self._seed, _ANCHORS), steps.shape)
    rows = permutation.distinct_block(steps, sizes, keys, self._num_groups).ravel()
    drawn = steps[:, None] * self._num_groups + np.arange(self._num_groups)
    epochs = drawn.ravel() // num_anchors
    groups = [
      self._anchors[rows, None].astype(np.int64),
      self._of(self._positives, rows, epochs, _POSITIVES, self._num_positives),
      self._of(self._negatives, rows, epochs, _NEGATIVES, self._num_negatives),
    ]
    return np.concatenate(groups, axis=1).reshape(len(steps), *self.shape)

  def _of(
    self,
    lists: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray,
    use: int,
    num_drawn: int,
  ) -> np.ndarray:
    """Draws from rows [R] of `lists` in epochs [R]; returns [R, num_drawn] int64."""
    listed = lists[rows]
    sizes = np.count_nonzero(listed >= 0, axis=1)
    keys = permutation.mix(self._seed, use, rows)
    positions = permutation.distinct_block(epochs, sizes, keys, num_drawn)
    return np.take_along_axis(listed, positions, axis=1).astype(np.int64)


@gin.register
def neighbouring_class_sampler(
  index: index_arrays.Classes,
  mining_round: Round,
  *,
  sampler_fn: Callable[..., PKSampler],
  hard_fraction: float,
  neighbours_per_seed: int,
  classes: Optional[np.ndarray] = None,
) -> PKSampler:
  """Returns a P×K sampler with a fraction of the classes in neighbourhoods of a round.

  Args:
    index: classes and their members.
    mining_round: a round with neighbours of classes.
    sampler_fn: builds the sampler, with P, K, seed and class weights.
    hard_fraction: fraction of the P classes, 0 … 1.
    neighbours_per_seed: approximate number of classes in a neighbourhood, in addition
      to its seed. If neighbourhoods overlap, the next nearest classes replace shared
      ones.
    classes: int32 ids of the classes to draw from; None for all.

  Raises:
    UserError: the fraction is outside 0 to 1, `neighbours_per_seed` is below 1, the
      round has no or too few neighbours of classes, or fewer than P classes can be
      drawn.
  """
  if not 0 <= hard_fraction <= 1 or neighbours_per_seed < 1:
    raise UserError(
      f"neighbouring_class_sampler: hard_fraction={hard_fraction} must be from 0 to 1, "
      f"and neighbours_per_seed={neighbours_per_seed} at least 1."
    )
  neighbours = mining_round.arrays.get("class_neighbours")
  if neighbours is None:
    raise UserError(
      "The round has no neighbours of classes; set Miner.num_class_neighbours."
    )
  if neighbours.shape[1] < neighbours_per_seed:
    raise UserError(
      f"neighbouring_class_sampler.neighbours_per_seed={neighbours_per_seed} exceeds "
      f"the {neighbours.shape[1]} neighbours of each class in a round; raise "
      "Miner.num_class_neighbours to several times as many: neighbourhoods overlap."
    )
  stream_fn = functools.partial(
    NeighbouringClassStream,
    neighbours=neighbours,
    hard_fraction=hard_fraction,
    neighbours_per_seed=neighbours_per_seed,
    round_step=mining_round.step,
  )
  return sampler_fn(index, classes=classes, stream_fn=stream_fn)


class NeighbouringClassStream:
  """Class stream of neighbourhoods, filled up with classes of another stream.

  The first s classes of the other stream are seeds. The nearest class of each seed
  follows, then the second nearest of each, and so on, without duplicates, until there
  are H. Then come the remaining classes of the other stream, until there are P. A batch
  takes O(s·m + P) numbers; only drawn classes and their neighbours are read.

  Args:
    stream: draws P distinct classes.
    num_drawn: P.
    class_ids: [C] int32, ids of the classes to draw from; None for all L.
    neighbours: [L, m] int32 ids, nearest first; −1 for none. May be memory-mapped.
    hard_fraction: H / P.
    neighbours_per_seed: about H / s − 1.
    round_step: step of the round, so that each round draws other members.
  """

  def __init__(
    self,
    stream: ClassStream,
    num_drawn: int,
    class_ids: Optional[np.ndarray],
    *,
    neighbours: np.ndarray,
    hard_fraction: float,
    neighbours_per_seed: int,
    round_step: int,
  ):
    self._stream = stream
    self._num_drawn = num_drawn
    self._num_hard = round(hard_fraction * num_drawn)
    self._num_seeds = -(-self._num_hard // (1 + neighbours_per_seed))
    self._neighbours = neighbours
    self._class_ids = class_ids
    self._positions: Optional[np.ndarray] = None
    if class_ids is not None:
      # One extra entry for −1.
      self._positions = np.full(len(neighbours) + 1, -1, np.int32)
      self._positions[class_ids] = np.arange(len(class_ids))
    self._key = permutation.mix(round_step, _BLOCKS)

  def draw(self, steps: np.ndarray) -> Draws:
    """Draws the classes of steps [S] int64, each neighbourhood together, seed first."""
    base = self._stream.draw(steps)
    if not self._num_hard:
      return base
    seeds = base.classes[:, : self._num_seeds]
    near = self._near(seeds)
    hard = np.concatenate([seeds, near], axis=1)
    is_hard = _is_first(hard) & (hard >= 0)
    is_hard &= np.cumsum(is_hard, axis=1) <= self._num_hard
    rest = base.classes[:, self._num_seeds :]
    every = np.concatenate([np.where(is_hard, hard, -1), rest], axis=1)
    is_drawn = _is_first(every) & (every >= 0)
    is_drawn &= np.cumsum(is_drawn, axis=1) <= self._num_drawn
    columns = self._columns_in_order(is_drawn)
    classes = np.take_along_axis(every, columns, axis=1)
    # The neighbours' columns lie between the two parts of the other stream's columns.
    is_near = (columns >= self._num_seeds) & (columns < hard.shape[1])
    of_stream = np.where(columns < self._num_seeds, columns, columns - near.shape[1])
    blocks = np.take_along_axis(base.blocks, np.where(is_near, 0, of_stream), axis=1)
    return Draws(classes, np.where(is_near, self._blocks(steps, classes), blocks))

  def _near(self, seeds: np.ndarray) -> np.ndarray:
    """Returns [S, m·s] int64 classes, the nearest of all seeds first; −1 for none."""
    ids = seeds if self._class_ids is None else self._class_ids[seeds]
    near = self._neighbours[ids]
    if self._positions is not None:
      near = self._positions[near]
    return near.transpose(0, 2, 1).reshape(len(seeds), -1).astype(np.int64)

  def _columns_in_order(self, is_drawn: np.ndarray) -> np.ndarray:
    """Returns the drawn columns, [S, P] int64, with each neighbourhood together."""
    num_near = self._neighbours.shape[1] * self._num_seeds
    ranks = np.arange(num_near + self._num_seeds)
    order = ranks % self._num_seeds * (1 + len(ranks)) + ranks
    num_others = is_drawn.shape[1] - len(ranks)
    order = np.append(order, len(ranks) * (2 + len(ranks)) + np.arange(num_others))
    by_place = np.argsort(order)
    found = np.argsort(~is_drawn[:, by_place], axis=1, kind="stable")
    return by_place[found[:, : self._num_drawn]]

  def _blocks(self, steps: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns a pseudorandom block of members for each class, [S, …] int64."""
    hashes = permutation.mix(self._key, steps[:, None], classes)
    return (hashes >> np.uint64(33)).astype(np.int64)


def _is_first(values: np.ndarray) -> np.ndarray:
  """Returns which values [S, n] have no equal earlier value in their row."""
  order = np.argsort(values, axis=1, kind="stable")
  in_order = np.take_along_axis(values, order, axis=1)
  is_new = np.ones(values.shape, bool)
  is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
  is_first = np.empty_like(is_new)
  np.put_along_axis(is_first, order, is_new, axis=1)
  return is_first
