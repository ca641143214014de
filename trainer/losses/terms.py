"""What a loss takes and gives: local anchors, candidates, and sums yet to be divided.

Shapes: A anchors (this replica's), C candidates, of which F are fixed, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import tensorflow as tf


class Anchors(NamedTuple):
  """The examples of this replica, from which distances are taken.

  Attributes:
    embeddings: [A, D] float.
    labels: [A] int32, or [A, L] bool for several labels an example.
    weights: [A] float32 >= 0; 0 for a padding row.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  weights: tf.Tensor


class Candidates(NamedTuple):
  """The examples to which distances are taken, the anchors among them.

  Attributes:
    embeddings: [C − F, D] float, of the first candidates.
    labels: [C] int32, or [C, L] bool.
    is_valid: [C] bool; false for a padding row.
    positions: [A] int32, where each anchor stands among the candidates.
    is_relevant: [A, C] bool, which candidates are positives of which anchor; None to
      compare labels.
    fixed_embeddings: [F, D] float, of the last candidates, which get no gradient and
      are no anchors: those of a memory bank. Finite, also where they are not valid.
      None where there are none.
    is_compared: [A, C] bool, which candidates count for which anchor; None for all.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  is_valid: tf.Tensor
  positions: tf.Tensor
  is_relevant: Optional[tf.Tensor] = None
  fixed_embeddings: Optional[tf.Tensor] = None
  is_compared: Optional[tf.Tensor] = None

  def of_anchors(self, numbers: tf.Tensor) -> Candidates:
    """The same candidates, of the anchors with these numbers, [n] int32."""
    return self._replace(
      positions=tf.gather(self.positions, numbers),
      is_relevant=_rows(self.is_relevant, numbers),
      is_compared=_rows(self.is_compared, numbers),
    )


class Ratio(NamedTuple):
  """A statistic that adds up over steps and replicas; its value is total / count.

  Attributes:
    total: [] float32.
    count: [] float32.
  """

  total: tf.Tensor
  count: tf.Tensor


class LossTerms(NamedTuple):
  """This replica's part of a loss; the loss is Σ total / Σ count over all replicas.

  Attributes:
    total: [] float32, differentiable.
    count: [] float32, without gradient.
    statistics: by metric name, each a `Ratio` or another structure of sums, which add
      up over steps and replicas; see `trainer.losses.statistics`.
  """

  total: tf.Tensor
  count: tf.Tensor
  statistics: Mapping[str, Any]


LossFn = Callable[[Anchors, Candidates], LossTerms]


def _rows(pairs: Optional[tf.Tensor], numbers: tf.Tensor) -> Optional[tf.Tensor]:
  return None if pairs is None else tf.gather(pairs, numbers)
