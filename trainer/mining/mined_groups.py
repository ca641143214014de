"""Batches of mined groups: an anchor, its positives, its negatives.

Shapes: S steps, T groups a batch, p positives and n negatives a group.
"""

from __future__ import annotations

from typing import Optional

import gin
import numpy as np

from trainer.data import distinct_stream, members, permutation
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining.round_to_come import Round

# What hashes are for, so that no two uses of one seed are alike (1 to 4: trainer.data).
_ANCHORS, _POSITIVES, _NEGATIVES = 5, 6, 7


@gin.register
class MinedGroups:
  """T groups of a round's examples: a pure function of seed, step and round.

  Each anchor comes once an epoch, and each time goes on in its positives and negatives
  where it was; of fewer than p or n each is repeated as equally often as possible. The
  anchors of a batch are distinct. A record may be in several groups of a batch: the
  losses take it as one more example of its class.

  Attributes:
    shape: (T, 1 + p + n).
    group: (p, n), as `WithinGroups` asks for it.

  Args:
    index: of the records; what it has is not looked at.
    mining_round: has examples.
    groups_per_batch: T.
    positives_per_group: p.
    negatives_per_group: n.
    seed: another seed, another order.
    classes: of the records; a round is of these already.

  Raises:
    UserError: a number is below 1, or the round has no examples or fewer than T.
  """

  def __init__(
    self,
    index: members.Classes,
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
        "MinedGroups of {} groups, {} positives and {} negatives is not possible; each "
        "must be at least 1.".format(*sizes)
      )
    arrays = mining_round.arrays
    if "anchors" not in arrays:
      raise UserError(
        "A round has no examples for MinedGroups; set Miner.examples = "
        "@ExampleMining()."
      )
    self._anchors = arrays["anchors"]
    self._positives, self._negatives = arrays["positives"], arrays["negatives"]
    if len(self._anchors) < groups_per_batch:
      raise TooFewExamplesError(
        f"MinedGroups.groups_per_batch={groups_per_batch} but a round has "
        f"{len(self._anchors)} anchors; choose at most so many, or mine in a wider "
        "window."
      )
    self._num_groups = groups_per_batch
    self._num_positives = positives_per_group
    self._num_negatives = negatives_per_group
    self._seed = int(permutation.mix(seed, mining_round.step)[0])
    self.shape = (groups_per_batch, 1 + positives_per_group + negatives_per_group)
    self.group = (positives_per_group, negatives_per_group)

  def batch(self, step: int) -> np.ndarray:
    """[T, 1 + p + n] int64, the record numbers of a step."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, T, 1 + p + n] int64, the record numbers of steps [S] int64."""
    num_anchors = len(self._anchors)
    sizes = np.full(steps.shape, num_anchors)
    keys = np.broadcast_to(permutation.mix(self._seed, _ANCHORS), steps.shape)
    rows = distinct_stream.block(steps, sizes, keys, self._num_groups).ravel()
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
    """[R, num_drawn] int64, what rows [R] of lists give in epochs [R]."""
    listed = lists[rows]
    sizes = np.count_nonzero(listed >= 0, axis=1)
    keys = permutation.mix(self._seed, use, rows)
    places = distinct_stream.block(epochs, sizes, keys, num_drawn)
    return np.take_along_axis(listed, places, axis=1).astype(np.int64)
