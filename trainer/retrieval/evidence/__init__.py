"""What a report shows beside figures: distances, mistakes, pictures, a map.

It is collected once, after an evaluation, and its size does not grow with the gallery.
"""

from trainer.retrieval.evidence.collect import collect
from trainer.retrieval.evidence.record import (
  Confusion,
  EmbeddingMap,
  Evidence,
  Histogram,
  Neighbour,
  Query,
  Sprite,
)

__all__ = [
  "Confusion",
  "EmbeddingMap",
  "Evidence",
  "Histogram",
  "Neighbour",
  "Query",
  "Sprite",
  "collect",
]
