"""What a step would change, before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from trainer.distribute.memory_bank import Entries
from trainer.losses.terms import Ratio


class Update(NamedTuple):
  """What a step changes; equal on all replicas.

  Attributes:
    gradients: of the global loss, to each trainable variable.
    entries: of the global batch, for the memory bank; None without one.
    active: terms of the loss that are not 0, and all terms, for a curriculum.
  """

  gradients: list[tf.Tensor]
  entries: Optional[Entries] = None
  active: Ratio = Ratio(0.0, 0.0)


class Proposal(NamedTuple):
  """An update that was computed and not yet made.

  Attributes:
    update: what it changes.
    statistics: of this replica; they add up over replicas and steps.
    is_finite: [] bool, whether embeddings, moving averages, loss and gradients of all
      replicas are finite, and the gradients' squared norm; equal on all replicas.
  """

  update: Update
  statistics: Mapping[str, Any]
  is_finite: tf.Tensor
