"""When embeddings have collapsed, told from the mining statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

# Half of all pairs at distance 0: no data set has so many duplicates in a batch.
_DUPLICATE_FRACTION = 0.5
# A cloud that small beside its distance from 0 is near the rounding of its distances.
_SPREAD = 5e-3
# All embeddings nearly on one line, and not because two classes are well apart.
_RANK = 1.2
_HARD_FRACTION = 0.1

ADVICE = (
  "try Encoder.is_normalized = True, a lower learning rate or a warm-up, "
  "BatchAllTripletLoss before BatchHardTripletLoss, or a soft margin; JitteredLoss "
  "around the loss leaves a collapsed state"
)


def describe_collapse(metrics: Mapping[str, float]) -> Optional[str]:
  """In words, what has collapsed; None where nothing has.

  Args:
    metrics: with those of `MiningStatistics`, if they are on.
  """
  duplicates = metrics.get("mining/duplicate_fraction", 0.0)
  if duplicates > _DUPLICATE_FRACTION:
    return f"{duplicates:.0%} of the pairs of a batch have equal embeddings"
  spread = metrics.get("mining/embedding_spread", 1.0)
  if spread < _SPREAD:
    return f"the embeddings differ by {spread:.1e} of their norm"
  rank = metrics.get("mining/embedding_rank", 2.0)
  if rank < _RANK and metrics.get("mining/hard_fraction", 0.0) > _HARD_FRACTION:
    return f"the embeddings lie on one line (effective rank {rank:.2f})"
  return None
