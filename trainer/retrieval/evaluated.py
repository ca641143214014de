"""What an evaluation found, and what it leaves in the run's folder.

Shapes: N items, D dimensions, Q queries, k neighbours.
"""

from __future__ import annotations

import csv
import io
import os
from typing import NamedTuple

import numpy as np

from trainer.data import paths
from trainer.data.dataset import Dataset
from trainer.retrieval import evidence, projector
from trainer.retrieval.items import RecordItems
from trainer.retrieval.judgements import LabelJudgements
from trainer.retrieval.neighbourhoods import SampledAnswers, sampled_answers
from trainer.retrieval.pictures import pictures_of
from trainer.retrieval.rankings import Rankings
from trainer.retrieval.results import Measurement


class Evaluated(NamedTuple):
  """What an evaluation embedded and found.

  Attributes:
    dataset: of the items.
    items: [N], that were embedded.
    embeddings: [N, D] float32.
    judged: who asked, what was relevant.
    rankings: the metrics of each query.
    measurement: what they come to.
  """

  dataset: Dataset
  items: RecordItems
  embeddings: np.ndarray
  judged: LabelJudgements
  rankings: Rankings
  measurement: Measurement

  def write_classes(self, model_dir: str) -> None:
    """Writes `eval/classes.csv`: every class with its metrics, the worst first."""
    rows = class_rows(self.rankings, self.items)
    path = os.path.join(model_dir, "eval", "classes.csv")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    paths.replace_file(path, text.getvalue())

  def sampled_answers(self) -> SampledAnswers:
    """Some queries with something to find, searched by all replicas."""
    return sampled_answers(self.embeddings, self.judged, self.rankings.queries)

  def write_evidence(self, model_dir: str, answers: SampledAnswers) -> None:
    """Writes what a person looks at: evidence for the report, a projector's files.

    Args:
      model_dir: folder of the run.
      answers: some queries and what they found.
    """
    found = evidence.collect(
      self.embeddings,
      self.items.labels,
      answers.neighbours,
      answers.queries,
      class_names=self.items.class_names,
      is_right=answers.is_right,
      pictures_fn=pictures_of(
        self.dataset.index, self.dataset.decoder, self.items.record_numbers
      ),
    )
    found.write(model_dir)
    projector.write(model_dir, found.embedding_map, self.embeddings)


def class_rows(rankings: Rankings, items: RecordItems) -> list[dict]:
  """{"class": name, "num_queries": n, metrics} of each class, the worst first."""
  return [
    {
      "class": items.class_names[label],
      **{name.replace("eval/", ""): value for name, value in row.items()},
    }
    for label, row in rankings.by_group(items.labels).items()
  ]
