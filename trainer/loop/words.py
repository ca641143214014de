"""What the hosts tell each other, once a call of the inner loop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.loop.checkpoint import Checkpoints
from trainer.preemption import Preemption


class Said(NamedTuple):
  """What at least one host said; the same on all.

  Attributes:
    is_told_to_stop: it was told to stop.
    is_saving_impossible: its last checkpoint could not be written.
  """

  is_told_to_stop: bool
  is_saving_impossible: bool


def speak(preemption: Preemption, checkpoints: Checkpoints) -> np.ndarray:
  """[2] int32, what this host says."""
  return np.array([preemption.is_told, checkpoints.failure is not None], np.int32)


def understand(words: np.ndarray) -> Said:
  """What was said, of the sum over hosts."""
  return Said(*(bool(word) for word in words > 0))
