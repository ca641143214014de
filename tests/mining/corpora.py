"""Small corpora of embeddings, and a hand-made mining round."""

from __future__ import annotations

import numpy as np

from trainer.data.index_arrays import members_from_labels
from trainer.mining import corpus, round
from trainer.mining.miner import RoundContent

FINGERPRINT = {"the number of records": "60"}


class Corpus:
  """Classes of unequal sizes around centres, with copies.

  Args:
    sizes: records of each class.
    num_copies: pairs of records of different classes with one content.
  """

  def __init__(self, sizes, *, num_copies=0, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    self.labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    self.labels = self.labels.astype(np.int32)
    centres = rng.standard_normal((len(sizes), 5))
    noise = spread * rng.standard_normal((len(self.labels), 5))
    self.embeddings = (centres[self.labels] + noise).astype(np.float32)
    self.contents = np.arange(len(self.labels), dtype=np.uint64)
    for _ in range(num_copies):
      one, other = rng.choice(len(self.labels), 2, replace=False)
      self.contents[other] = self.contents[one]
      self.embeddings[other] = self.embeddings[one]
    self.table = members_from_labels(self.labels, len(sizes))

  def items(self, classes=None, records_per_class=None, key=3):
    if classes is None:
      classes = np.arange(self.table.num_classes, dtype=np.int32)
    return corpus.draw_items(self.table, classes, records_per_class, key)


def distances(embeddings):
  """Returns [N, N] float64 distances by the definition."""
  difference = embeddings[:, None].astype(np.float64) - embeddings[None]
  return np.sqrt((difference**2).sum(-1))


def write_round(
  model_dir, step, fingerprint=None, num_records=60, num_classes=9, **arrays
):
  """Writes a round and opens it."""
  fingerprint = FINGERPRINT if fingerprint is None else fingerprint
  round.write_round(
    str(model_dir),
    step,
    RoundContent(arrays, {"counts": {"anchors": len(arrays.get("anchors", ()))}}),
    fingerprint=fingerprint,
    num_records=num_records,
    num_classes=num_classes,
  )
  return round.MiningRound(str(model_dir), step, fingerprint)


def example_arrays(num_anchors=20, num_positives=3, num_negatives=5, seed=0):
  """Returns lists of record numbers of unequal lengths."""
  rng = np.random.default_rng(seed)

  def lists(width, first):
    values = first + np.argsort(rng.random((num_anchors, 20)), axis=1)[:, :width]
    sizes = rng.integers(1, width + 1, num_anchors)
    return np.where(np.arange(width) < sizes[:, None], values, -1)

  return {
    "anchors": np.arange(num_anchors),
    "positives": lists(num_positives, 20),
    "negatives": lists(num_negatives, 40),
  }
