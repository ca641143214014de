"""Exact search against FAISS's flat index: python -m tests.benchmarks.search.

10,000 queries in a gallery of 1,000,000 × 128, k = 100: time as a ratio in one run, and
memory above the data. --small for a tenth of both.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf

from tests.benchmarks import measure
from trainer.retrieval.knn import nearest

_NUM_NEIGHBOURS = 100


def main() -> None:
  """Prints the costs."""
  import faiss

  scale = 10 if "--small" in sys.argv else 1
  rng = np.random.default_rng(0)
  gallery = rng.standard_normal((1_000_000 // scale, 128), np.float32)
  queries = rng.standard_normal((10_000 // scale, 128), np.float32)
  print(f"TensorFlow {tf.__version__}, FAISS {faiss.__version__}")
  index = faiss.IndexFlatL2(128)
  index.add(gallery)
  found = {}

  def ours():
    found["ours"] = nearest(queries, gallery, num_neighbours=_NUM_NEIGHBOURS).indices

  def theirs():
    found["theirs"] = index.search(queries, _NUM_NEIGHBOURS)[1]

  costs = measure.compare({"search": ours, "FAISS": theirs}, num_rounds=1)
  measure.show(
    f"{len(queries):,} queries in {len(gallery):,} (goals: 1.5 x, 2,000 MB)",
    costs,
    "FAISS",
  )
  same = np.mean(found["ours"] == found["theirs"])
  print(f"  places that hold the same item: {same:.6f}")


if __name__ == "__main__":
  main()
