"""Mode `evaluate`: measures retrieval on the held-out classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import gin
import numpy as np
import tensorflow as tf

from trainer.data.dataset import Dataset
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UserError
from trainer.loop.checkpoint import Checkpoints
from trainer.retrieval.embed import embed
from trainer.retrieval.leave_one_out import evaluate_leave_one_out
from trainer.retrieval.results import Results
from trainer.run import Run


def main(run: Run) -> None:
  """Evaluates the newest checkpoint of a run."""
  with make_strategy(run.hardware, run.facts()).scope():
    workers = current_workers()
    evaluation = workers.together(lambda: Evaluation())  # type: ignore[call-arg]
    workers.agree(evaluation.dataset.index.facts())
    step = evaluation.restore(run.model_dir)
    metrics = evaluation.measure()
    workers.chief_first(lambda: _report(run, step, metrics))


def _report(run: Run, step: int, metrics: Mapping[str, float]) -> None:
  results = Results(run.model_dir)
  results.write_latest(step, metrics)
  print(results.table())


@gin.configurable("evaluate")
@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Leave-one-out retrieval over the dataset's evaluation classes.

  Attributes:
    encoder: the encoder to measure.
    dataset: records, classes and decoder.
    global_batch_size: records embedded at once, over all replicas; rounded up to a
      multiple of their number.
    recall_ks: the k of recall@k.
  """

  encoder: tf.keras.Model
  dataset: Dataset
  global_batch_size: int = 256
  recall_ks: Sequence[int] = (1, 5, 10)

  def restore(self, model_dir: str) -> int:
    """Restores the encoder from the newest checkpoint of a run.

    Args:
      model_dir: folder of the run.

    Returns:
      The number of steps it was trained.

    Raises:
      UserError: there is no checkpoint, or it is of another encoder.
    """
    self.encoder.create_variables(self.dataset.decoder.shape)
    workers = current_workers()
    step = workers.together(
      lambda: Checkpoints(model_dir=model_dir, encoder=self.encoder).restore()
    )
    workers.agree({f"the step of the newest checkpoint in {model_dir}": step})
    if step is None:
      raise UserError(f"{model_dir} has no checkpoint; run --mode=train first.")
    return step

  def measure(self) -> dict[str, float]:
    """Embeds the evaluation classes with the encoder as it is now, and measures.

    Returns:
      Metrics by name; see `trainer.retrieval.leave_one_out`.

    Raises:
      UserError: there is nothing to measure.
    """
    index = self.dataset.index
    members = [index.members(label) for label in self.dataset.evaluation_classes]
    record_numbers = np.sort(np.concatenate(members))
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    embeddings = embed(
      self.encoder,
      self.dataset,
      record_numbers,
      strategy=tf.distribute.get_strategy(),
      global_batch_size=-(-self.global_batch_size // num_replicas) * num_replicas,
    )
    return evaluate_leave_one_out(
      embeddings, index.labels[record_numbers], recall_ks=self.recall_ks
    )
