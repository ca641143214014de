"""Results of an evaluation, `eval/metrics.json` and `eval/classes.csv`.

Shapes: N items, D dimensions, Q queries, k neighbours.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.data.dataset import Dataset
from trainer.errors import UserError
from trainer.retrieval import report_collector
from trainer.retrieval.ground_truth import LabelGroundTruth, RecordItems
from trainer.retrieval.pictures import pictures_of
from trainer.retrieval.query import SampledResults, sample_results
from trainer.retrieval.ranking import Rankings
from trainer.runtime import filesystem

RESULTS_FILE = os.path.join("eval", "metrics.json")
_HEADS = {"before_training": "before training", "latest": "after training"}
# Patterns of the names in tables, in this order, and their titles.
_TITLES = {
  r"recall_at_(\d+)": r"recall@\1",
  "map_at_r": "MAP@R",
  "map": "MAP",
  "r_precision": "R-precision",
  "mrr": "MRR",
  "roc_auc": "ROC-AUC",
  r"tpr_at_fpr_(.+)": r"TPR@FPR=\1",
  "nmi": "NMI",
}


class Measurement(NamedTuple):
  """Metrics of one evaluation.

  Attributes:
    metrics: by metric name, such as "eval/recall_at_1".
    intervals: low and high of the metrics that are means over queries.
    worst_classes: {"class": name, "num_queries": n, metrics}, the worst first.
    categories: metrics by category.
    queries_without_relevant: first names of the queries without relevant items.
  """

  metrics: Mapping[str, float]
  intervals: Mapping[str, Sequence[float]] = {}
  worst_classes: Sequence[Mapping[str, Any]] = ()
  categories: Mapping[str, Mapping[str, float]] = {}
  queries_without_relevant: Sequence[str] = ()


class Results:
  """The evaluation results of a run: {"before_training": {...}, "latest": {...}}.

  Each has "step", the metrics by name, and the other fields of a `Measurement`.

  Args:
    model_dir: folder of the run; existing results are read.

  Raises:
    UserError: the results in it are damaged.
  """

  def __init__(self, model_dir: str):
    self.path = os.path.join(model_dir, RESULTS_FILE)
    self.by_moment: dict[str, dict[str, Any]] = {}
    if os.path.exists(self.path):
      self.by_moment = _read(self.path)

  def write_before_training(self, found: Measurement) -> None:
    """Writes the results of the untrained encoder.

    Args:
      found: result of the evaluation.
    """
    self.by_moment = {"before_training": _moment(0, found)}
    self._write()

  def write_latest(self, step: int, found: Measurement) -> None:
    """Writes the results of the current encoder.

    Args:
      step: number of steps it was trained.
      found: result of the evaluation.
    """
    self.by_moment["latest"] = _moment(step, found)
    self._write()

  def rows(self) -> list[list[str]]:
    """Returns the main metrics, one column per moment; the first row is the header."""
    moments = [self.by_moment[m] for m in _HEADS if m in self.by_moment]
    heads = [head for m, head in _HEADS.items() if m in self.by_moment]
    rows = [["", *heads]]
    for name, title in result_titles(moments[0] if moments else ()).items():
      if all(name in moment for moment in moments):
        rows.append([title, *(_cell(moment, name) for moment in moments)])
    return rows

  def table(self) -> str:
    """Returns the rows as printable text."""
    return "\n".join(
      f"{row[0]:<14}" + "".join(f"{cell:>26}" for cell in row[1:])
      for row in self.rows()
    )

  def _write(self):
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    filesystem.replace_file(self.path, json.dumps(self.by_moment, indent=2))


def _read(path: str) -> dict[str, dict[str, Any]]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} can't be read ({error}); remove it, and run --mode=evaluate again."
    ) from error
  is_valid = isinstance(content, dict) and all(
    isinstance(moment, dict) for moment in content.values()
  )
  if not is_valid:
    raise UserError(
      f"{path} is not an object of results by moment; remove it, and run "
      "--mode=evaluate again."
    )
  return content


def result_titles(names) -> dict[str, str]:
  """Returns the titles of the displayed metrics by name, in display order.

  Args:
    names: of metrics, such as "eval/recall_at_1".
  """
  found = {}
  for pattern, title in _TITLES.items():
    for name in names:
      match = re.fullmatch(f"eval/{pattern}", name)
      if match:
        found[name] = match.expand(title)
  return found


def _moment(step: int, found: Measurement) -> dict[str, Any]:
  rest = {name: value for name, value in found._asdict().items() if value}
  return {"step": step, **rest.pop("metrics"), **rest}


def _cell(moment: Mapping[str, Any], name: str) -> str:
  interval = moment.get("intervals", {}).get(name)
  between = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
  return f"{moment[name]:.4f}{between}"


class EvaluationResult(NamedTuple):
  """Embeddings and results of an evaluation.

  Attributes:
    dataset: of the items.
    items: [N], the embedded items.
    embeddings: [N, D] float32.
    ground_truth: queries, gallery and ground truth.
    rankings: the metrics of each query.
    measurement: the metrics of the evaluation.
  """

  dataset: Dataset
  items: RecordItems
  embeddings: np.ndarray
  ground_truth: LabelGroundTruth
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
    filesystem.replace_file(path, text.getvalue())

  def sample_results(self) -> SampledResults:
    """Returns sampled queries with relevant items, searched on all replicas."""
    return sample_results(self.embeddings, self.ground_truth, self.rankings.queries)

  def write_report_data(self, model_dir: str, query_results: SampledResults) -> None:
    """Writes the data of the report and the files of the projector.

    Args:
      model_dir: folder of the run.
      query_results: sampled queries and their neighbours.
    """
    found = report_collector.collect_report_data(
      self.embeddings,
      self.items.labels,
      query_results.neighbours,
      query_results.queries,
      class_names=self.items.class_names,
      is_right=query_results.is_right,
      pictures_fn=pictures_of(
        self.dataset.index, self.dataset.decoder, self.items.record_numbers
      ),
    )
    found.write(model_dir)
    report_collector.write_projector(model_dir, found.embedding_map, self.embeddings)


def class_rows(rankings: Rankings, items: RecordItems) -> list[dict]:
  """Returns {"class": name, "num_queries": n, metrics} per class, the worst first."""
  return [
    {
      "class": items.class_names[label],
      **{name.replace("eval/", ""): value for name, value in row.items()},
    }
    for label, row in rankings.by_group(items.labels).items()
  ]
