"""The nearest items of some queries, for a person to look at.

Shapes: N items, D dimensions, Q sampled queries, k neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer.retrieval.judgements import LabelJudgements
from trainer.retrieval.search import nearest

_MAX_QUERIES, _MAX_NEIGHBOURS = 2_000, 100
# Queries that exclude more would be searched much deeper than is looked at.
_MAX_EXCLUDED = 200


class SampledAnswers(NamedTuple):
  """Some queries and what is nearest to them, without what doesn't count.

  Attributes:
    queries: [Q] int64, items.
    neighbours: [Q, k] int64, items, nearest first.
    is_right: [Q, k] bool, whether they are relevant.
  """

  queries: np.ndarray
  neighbours: np.ndarray
  is_right: np.ndarray


def sampled_answers(
  embeddings: np.ndarray,
  judged: LabelJudgements,
  asking: np.ndarray,
  *,
  seed: int = 0,
) -> SampledAnswers:
  """Neighbours of queries that are drawn at random, searched by all replicas.

  Args:
    embeddings: [N, D] float32, finite.
    judged: what is found, and what is relevant to whom.
    asking: [n] int64, the items to draw from; each has something to find.
    seed: of the drawing.

  Returns:
    At most 2,000 queries with at most 100 neighbours each.
  """
  rng = np.random.default_rng(seed)
  rows = np.flatnonzero(np.isin(judged.queries, asking))
  drawn = np.sort(rng.permutation(rows)[:_MAX_QUERIES])
  judgements = [judged.judge(query) for query in drawn]
  num_excluded = np.array([len(excluded) for _, excluded in judgements])
  is_kept = num_excluded <= max(_MAX_EXCLUDED, num_excluded.min())
  drawn, most = drawn[is_kept], int(num_excluded[is_kept].max())
  num_neighbours = min(_MAX_NEIGHBOURS, len(judged.gallery) - most)
  found = nearest(
    embeddings[judged.queries[drawn]],
    embeddings[judged.gallery],
    num_neighbours=num_neighbours + most,
  ).indices
  neighbours = np.empty([len(drawn), num_neighbours], np.int64)
  is_right = np.empty([len(drawn), num_neighbours], bool)
  for place, row in enumerate(np.flatnonzero(is_kept)):
    relevant, excluded = judgements[row]
    counting = found[place][~np.isin(found[place], excluded)]
    neighbours[place] = counting[:num_neighbours]
    is_right[place] = np.isin(neighbours[place], relevant)
  return SampledAnswers(judged.queries[drawn], judged.gallery[neighbours], is_right)
