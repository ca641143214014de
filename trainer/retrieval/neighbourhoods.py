"""The nearest items of some queries, for a person to look at.

Shapes: N items, D dimensions, Q sampled queries, k neighbours.
"""

from __future__ import annotations

import numpy as np

from trainer.retrieval.judgements import LabelJudgements
from trainer.retrieval.search import nearest

_MAX_QUERIES, _MAX_NEIGHBOURS = 2_000, 100


def sampled_neighbours(
  embeddings: np.ndarray, judged: LabelJudgements, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Neighbours of queries that are drawn at random, without what doesn't count.

  Args:
    embeddings: [N, D] float32, finite.
    judged: who asks, what is found.
    seed: of the drawing.

  Returns:
    [Q] int64, the items that ask, and [Q, k] int64, those nearest to each.
  """
  rng = np.random.default_rng(seed)
  num_queries = min(_MAX_QUERIES, len(judged.queries))
  drawn = np.sort(rng.permutation(len(judged.queries))[:num_queries])
  excluded = [judged.judge(query)[1] for query in drawn]
  most = max(len(each) for each in excluded)
  num_neighbours = min(_MAX_NEIGHBOURS, len(judged.gallery) - most)
  found = nearest(
    embeddings[judged.queries[drawn]],
    embeddings[judged.gallery],
    num_neighbours=num_neighbours + most,
  )
  kept = [
    row[~np.isin(row, each)][:num_neighbours]
    for row, each in zip(found.indices, excluded)
  ]
  return judged.queries[drawn], judged.gallery[np.array(kept, np.int64)]
