"""Batches of triplets that a list names.

Shapes: S steps, T triplets in a batch.
"""

from __future__ import annotations

from typing import Optional

import gin
import numpy as np
from absl import logging

from trainer.data import distinct_stream, permutation, triplet_list
from trainer.data.records import RecordIndex
from trainer.errors import UserError

# What a hash is for, so that no two uses of one seed are alike (1 to 7: others).
_TRIPLETS = 8


@gin.register
class TripletSchedule:
  """The triplets of a list, each once an epoch, in an order of the seed.

  Each row of a batch is an anchor, a positive and a negative. Triplets with a record of
  a class that is not trained on are left out, and counted.
  """

  rows_parameter = "TripletSchedule.triplets_per_batch"
  # Positives and negatives of a row, after its anchor.
  group = (1, 1)

  def __init__(
    self,
    index: RecordIndex,
    *,
    file: str,
    triplets_per_batch: int,
    seed: int,
    bad_triplets: str = "refuse",
    classes: Optional[np.ndarray] = None,
  ):
    """Reads the list.

    Args:
      index: the records; all are read once, at the start, where the list has keys.
      file: CSV or TSV with the columns anchor, positive and negative, of the records'
        keys; or an .npy array [n, 3] of record numbers.
      triplets_per_batch: T.
      seed: another seed, another order.
      bad_triplets: "refuse" a list, or "leave_out" those triplets, that have unknown
        records, a negative of the anchor's own class, or the anchor or the negative for
        their positive.
      classes: int32 ids of the classes to draw from; None for all.

    Raises:
      UserError: the list can't be read, has such triplets, or no other; or T is below
        1.
    """
    if triplets_per_batch < 1:
      raise UserError(f"{self.rows_parameter}={triplets_per_batch} must be at least 1.")
    if bad_triplets not in ("refuse", "leave_out"):
      raise UserError(
        f"TripletSchedule.bad_triplets={bad_triplets!r} is not known; choose 'refuse' "
        "or 'leave_out'."
      )
    self.shape = (triplets_per_batch, len(triplet_list.COLUMNS))
    self._key = permutation.mix(seed, _TRIPLETS)
    listed = triplet_list.read_triplets(file, index, is_strict=bad_triplets == "refuse")
    self._triplets = listed
    if classes is not None:
      is_drawn = np.zeros(index.num_classes, bool)
      is_drawn[classes] = True
      self._triplets = listed[is_drawn[index.labels[listed]].all(axis=1)]
    num_drawn = len(self._triplets)
    if not num_drawn:
      why = "it is empty, or all of it was left out"
      if len(listed):
        why = f"{len(listed)} could be learned from, of classes that are not trained on"
      raise UserError(f"{file} has no triplet to train on: {why}.")
    logging.info(
      "%s: %d triplets, and %d of classes that are not trained on.",
      file,
      num_drawn,
      len(listed) - num_drawn,
    )

  @property
  def num_triplets(self) -> int:
    """How many are drawn from."""
    return len(self._triplets)

  def batch(self, step: int) -> np.ndarray:
    """[T, 3] int64, the record numbers of a step."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, T, 3] int64, the record numbers of steps [S] int64."""
    sizes = np.full(steps.shape, self.num_triplets)
    keys = np.broadcast_to(self._key, steps.shape)
    return self._triplets[distinct_stream.block(steps, sizes, keys, self.shape[0])]
