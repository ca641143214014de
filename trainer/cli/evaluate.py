"""Mode `evaluate`: measures retrieval on the held-out classes."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np
import tensorflow as tf

from trainer.data.dataset import Dataset
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UserError, check_choice
from trainer.report import page
from trainer.retrieval.embedder import Embedder
from trainer.retrieval.ground_truth import (
  EvaluationProtocol,
  LabelGroundTruth,
  LeaveOneOut,
  RecordItems,
)
from trainer.retrieval.metrics import Clustering, Verification
from trainer.retrieval.ranking import Rankings, metric_names, rank
from trainer.retrieval.results import EvaluationResult, Measurement, Results, class_rows
from trainer.run import Run, watching
from trainer.training.checkpoint import Checkpoints

# Subfolder of a run's folder, with checkpoints in the same layout.
BEST_FOLDER = "best"
_NUM_WORST, _NUM_WITHOUT_RELEVANT = 20, 20
_LEAVE_ONE_OUT, _VERIFICATION = LeaveOneOut(), Verification()


def main(run: Run) -> None:
  """Evaluates the newest checkpoint of a run."""
  strategy = make_strategy(run.hardware, run.fingerprint())
  with strategy.scope(), watching(run, current_workers().index):
    workers = current_workers()
    evaluation = make_evaluation()
    workers.check_equal(evaluation.dataset.index.fingerprint())
    step = evaluation.restore(run.model_dir)
    result = evaluation.evaluate()
    publish(run.model_dir, step, result)


def publish(model_dir: str, step: int, result: EvaluationResult) -> None:
  """Writes the results of an evaluation, and prints its table.

  Must be called on all workers, whose replicas share the search; the chief writes.

  Args:
    model_dir: folder of the run.
    step: number of steps the encoder was trained.
    result: results of the evaluation.
  """
  query_results = result.sample_results()

  def write():
    results = Results(model_dir)
    try:
      results.write_latest(step, result.measurement)
      result.write_classes(model_dir)
      result.write_report_data(model_dir, query_results)
      page.write_page(model_dir)
    finally:  # Print the results even if the disk is full.
      print(results.table())

  current_workers().run_on_chief(write)


@gin.configurable("evaluate")
@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates retrieval over the dataset's evaluation classes.

  Attributes:
    encoder: the encoder to evaluate.
    dataset: records, classes and decoder.
    global_batch_size: records embedded at once, over all replicas; rounded up to a
      multiple of their number.
    protocol: divides items into queries and gallery, and defines relevance.
    ks: the k of recall@k, precision@k, mAP@k, nDCG@k.
    category_feature: name of a feature of the records; metrics are also reported for
      each of its values among the queries. None for no categories.
    verification: pair metrics; None to skip them.
    clustering: clustering metrics; None to skip them.
    checkpoint: "newest", or "best", which `EarlyStopping` keeps.

  Raises:
    UserError: `checkpoint` is neither.
  """

  encoder: tf.keras.Model
  dataset: Dataset
  global_batch_size: int = 256
  protocol: EvaluationProtocol = _LEAVE_ONE_OUT
  ks: Sequence[int] = (1, 5, 10)
  category_feature: Optional[str] = None
  verification: Optional[Verification] = _VERIFICATION
  clustering: Optional[Clustering] = None
  checkpoint: str = "newest"

  def __post_init__(self):
    check_choice("evaluate.checkpoint", self.checkpoint, ("newest", "best"))

  def restore(self, model_dir: str) -> int:
    """Restores the encoder from the newest or the best checkpoint of a run.

    Args:
      model_dir: folder of the run.

    Returns:
      The number of steps it was trained.

    Raises:
      UserError: there is no checkpoint, or it is of another encoder.
    """
    if self.checkpoint == "best":
      model_dir = os.path.join(model_dir, BEST_FOLDER)
    return restore_encoder(self.encoder, self.dataset.decoder.shape, model_dir)

  def evaluate(self) -> EvaluationResult:
    """Embeds the evaluation classes with the current encoder, and computes metrics.

    Returns:
      Embeddings, rankings and metrics.

    Raises:
      UserError: there are no records, or a record lacks a feature.
    """
    index = self.dataset.index
    members = [index.members(label) for label in self.dataset.evaluation_classes]
    numbers = np.sort(np.concatenate([np.empty(0, np.int64), *members]))
    if not len(numbers):
      raise UserError("No record belongs to an evaluation class; change Dataset.split.")
    items = RecordItems(index, numbers)
    batches = self._embedder.embed(items.record_numbers)
    embeddings = np.concatenate(list(batches))[: len(items.labels)]
    ground_truth = self.protocol.make_ground_truth(items)
    rankings = rank(embeddings, ground_truth, ks=self.ks)
    measurement = self._measurement(items, embeddings, ground_truth, rankings)
    return EvaluationResult(
      self.dataset, items, embeddings, ground_truth, rankings, measurement
    )

  def metric_names(self) -> list[str]:
    """Returns the names of the metrics."""
    names = metric_names(self.ks)
    for measure in (self.verification, self.clustering):
      names += measure.metric_names() if measure is not None else []
    return names

  @functools.cached_property
  def _embedder(self) -> Embedder:
    return Embedder(
      self.encoder,
      self.dataset.index,
      self.dataset.decoder,
      global_batch_size=self.global_batch_size,
    )

  def _measurement(
    self,
    items: RecordItems,
    embeddings: np.ndarray,
    ground_truth: LabelGroundTruth,
    rankings: Rankings,
  ) -> Measurement:
    metrics = rankings.means()
    # Distractors have no class.
    is_labelled = ground_truth.labels.is_labelled()
    embeddings, labels = embeddings[is_labelled], items.labels[is_labelled]
    if self.verification is not None:
      groups = None if ground_truth.groups is None else ground_truth.groups[is_labelled]
      metrics.update(self.verification.measure(embeddings, labels, groups))
    if self.clustering is not None:
      metrics.update(self.clustering.measure(embeddings, labels))
    without_relevant = rankings.queries_without_relevant[:_NUM_WITHOUT_RELEVANT]
    return Measurement(
      metrics=metrics,
      intervals=rankings.intervals(),
      worst_classes=class_rows(rankings, items)[:_NUM_WORST],
      categories=self._categories(rankings, items),
      queries_without_relevant=list(items.names(without_relevant)),
    )

  def _categories(
    self, rankings: Rankings, items: RecordItems
  ) -> dict[str, dict[str, float]]:
    if self.category_feature is None:
      return {}
    values = items.feature(self.category_feature)
    return rankings.by_group(np.array([str(v[0]) if v else "" for v in values]))


def make_evaluation() -> Evaluation:
  """Builds the evaluation described by gin; an error on one worker ends all.

  Returns:
    An evaluation whose encoder has no variables yet, but can create them on every
    worker.

  Raises:
    UserError: a part is missing or does not fit, on some worker.
  """

  def make():
    return Evaluation()  # type: ignore[call-arg]

  def dry_run():
    evaluation = make()
    evaluation.encoder.create_variables(evaluation.dataset.decoder.shape)

  workers = current_workers()
  workers.dry_run(dry_run)
  return workers.run_on_all(make)


def restore_encoder(
  encoder: tf.keras.Model, input_shape: Sequence[int], model_dir: str
) -> int:
  """Restores an encoder from the newest checkpoint of a run.

  Args:
    encoder: without variables yet.
    input_shape: shape of one input.
    model_dir: folder of the run.

  Returns:
    The number of steps it was trained.

  Raises:
    UserError: there is no checkpoint, or it is of another encoder.
  """
  workers = current_workers()
  encoder.create_variables(input_shape)
  checkpoints = Checkpoints(model_dir=model_dir, encoder=encoder)
  step = workers.run_on_all(checkpoints.restore)
  workers.check_equal({f"the step of the newest checkpoint in {model_dir}": step})
  if step is None:
    raise UserError(f"{model_dir} has no checkpoint; run --mode=train first.")
  return step
