"""Queries worth looking at, and the classes that are taken for each other.

Shapes: G items, Q queries, k neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np

from trainer.retrieval.evidence.record import Confusion, Neighbour, Query

NUM_QUERIES = 24
NUM_NEIGHBOURS = 8
_NUM_CONFUSIONS = 12
# Of the shown queries; the others are right, so that these are seen too.
_MOST_MISTAKES = 18


@dataclasses.dataclass(frozen=True)
class Answers:
  """What was asked and what came of it; each query has a relevant item.

  Attributes:
    embeddings: [G, D] float32.
    labels: [G] int.
    queries: [Q] int64, items.
    neighbours: [Q, k] int64, items, nearest first.
    is_right: [Q, k] bool, whether a neighbour is relevant to the query.
    class_names: name of each label.
  """

  embeddings: np.ndarray
  labels: np.ndarray
  queries: np.ndarray
  neighbours: np.ndarray
  is_right: np.ndarray
  class_names: Union[Sequence[str], Mapping[int, str]]

  def name(self, item: int) -> str:
    """The name of an item's class."""
    return self.class_names[int(self.labels[item])]


def confusions(answers: Answers) -> list[Confusion]:
  """The most frequent pairs of a query's class and that of its nearest neighbour.

  Args:
    answers: to all queries.

  Returns:
    At most 12, the most frequent first; among equals the lower labels. The query that
    stands for a pair is the one that is nearest to its wrong neighbour.
  """
  of_another = (
    answers.labels[answers.neighbours[:, 0]] != answers.labels[answers.queries]
  )
  mistakes = np.flatnonzero(~answers.is_right[:, 0] & of_another)
  asked, found = answers.queries[mistakes], answers.neighbours[mistakes, 0]
  pairs, pair_of, counts = np.unique(
    np.stack([answers.labels[asked], answers.labels[found]]),
    axis=1,
    return_inverse=True,
    return_counts=True,
  )
  pair_of = np.ravel(pair_of)  # NumPy 2.0 alone gives it another shape.
  distances = np.linalg.norm(
    answers.embeddings[asked] - answers.embeddings[found], axis=1
  )
  labels, sizes = np.unique(answers.labels[answers.queries], return_counts=True)
  num_queries = dict(zip(labels.tolist(), sizes.tolist()))
  most = []
  for pair in np.argsort(-counts, kind="stable")[:_NUM_CONFUSIONS]:
    members = np.flatnonzero(pair_of == pair)
    example = members[np.argmin(distances[members])]
    most.append(
      Confusion(
        class_name=answers.name(asked[example]),
        taken_for=answers.name(found[example]),
        num_mistakes=int(counts[pair]),
        num_queries=num_queries[int(pairs[0, pair])],
        query=int(asked[example]),
        neighbour=int(found[example]),
      )
    )
  return most


def shown_queries(
  answers: Answers, wanted: Sequence[int], random: np.random.Generator
) -> list[Query]:
  """Queries to show: those wanted, then mistakes and right ones drawn at random.

  Args:
    answers: to all queries.
    wanted: items of mistakes that must be among them.
    random: draws the others.

  Returns:
    At most 24; mistakes first, those with the most wrong neighbours at the top.
  """
  is_right = answers.is_right
  rows = random.permutation(len(answers.queries))
  is_first = ~np.isin(answers.queries[rows], wanted)
  rows = rows[np.argsort(is_first, kind="stable")]  # The wanted come first.
  mistakes, right = rows[~is_right[rows, 0]], rows[is_right[rows, 0]]
  num_mistakes = min(len(mistakes), max(_MOST_MISTAKES, NUM_QUERIES - len(right)))
  chosen = [*mistakes[:num_mistakes], *right[: NUM_QUERIES - num_mistakes]]
  num_wrong = (~is_right[:, :NUM_NEIGHBOURS]).sum(axis=1)
  chosen.sort(key=lambda row: (is_right[row, 0], -num_wrong[row], row))
  return [_query(answers, row) for row in chosen]


def _query(answers: Answers, row: int) -> Query:
  item = int(answers.queries[row])
  neighbours = [
    Neighbour(
      item=int(other),
      class_name=answers.name(other),
      distance=float(
        np.linalg.norm(answers.embeddings[item] - answers.embeddings[other])
      ),
      is_right=bool(is_right),
    )
    for other, is_right in zip(
      answers.neighbours[row, :NUM_NEIGHBOURS], answers.is_right[row]
    )
  ]
  return Query(item=item, class_name=answers.name(item), neighbours=neighbours)
