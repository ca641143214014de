"""Mode `validate`: checks data and the batches that training would draw."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Callable, Optional

import gin
import numpy as np
from absl import logging

from trainer.data import records, shards, statistics
from trainer.data.dataset import Dataset
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.errors import UserError
from trainer.run import Run
from trainer.runtime import filesystem
from trainer.runtime.progress import Progress

VALIDATION_FILE = "validation.json"
_RECORDS_AT_A_TIME = 64
_NUM_NAMES = 5


def main(run: Run) -> None:
  """Validates the configured data."""
  validate(run)


@gin.configurable
def validate(
  run: Run,
  *,
  dataset: Dataset,
  sampler_fn: Optional[Callable[..., PKSampler]] = None,
  num_steps: int = 1000,
  num_records: Optional[int] = 10_000,
  min_members: Optional[int] = None,
  is_strict: bool = True,
) -> dict[str, Any]:
  """Checks the index, reads and decodes records, and counts the records drawn.

  Args:
    run: its folder gets `validation.json`.
    dataset: records, classes and decoder.
    sampler_fn: builds the sampler whose draws are counted; None to skip this.
    num_steps: number of steps drawn for that.
    num_records: number of records that are read and decoded, spread over all; None for
      all.
    min_members: records that each training class should have. None for the number that
      a batch of the sampler takes per class, or for no limit without a sampler.
    is_strict: whether an unusable record or a class with too few records is an error,
      instead of only being reported.

  Returns:
    The content of `validation.json`.

  Raises:
    UserError: the index is wrong or, if strict, a record is unusable or a class has too
      few records.
  """
  index = dataset.index
  _check_index(index)
  logging.info("%s", shards.summary_of_index(index).line())
  numbers = _spread(index.num_records, num_records)
  reasons = _check_records(index, dataset.decoder, numbers)
  report: dict[str, Any] = {
    "summary": dataclasses.asdict(shards.summary_of_index(index)),
    "num_train_classes": len(dataset.train_classes),
    "num_evaluation_classes": len(dataset.evaluation_classes),
    "num_records_checked": len(numbers),
    "bad_records": reasons,
  }
  logging.info("%d records read and decoded, %d bad.", len(numbers), len(reasons))
  if sampler_fn is not None:
    sampler = sampler_fn(index, classes=dataset.train_classes)
    if min_members is None and len(sampler.shape) > 1:
      min_members = sampler.shape[-1]
    drawn = statistics.draw_statistics(
      sampler, index.member_table, dataset.train_classes, num_steps
    )
    report["draws"] = dataclasses.asdict(drawn)
    for line in drawn.lines():
      logging.info("%s", line)
  small = statistics.find_small_classes(index, dataset.train_classes, min_members or 0)
  report["small_classes"] = dataclasses.asdict(small)
  if small.num_classes:
    logging.warning("%s.", small.line())
  _write(run.model_dir, report)
  if reasons and is_strict:
    shown = " ".join(reasons[:_NUM_NAMES])
    raise UserError(
      f"{len(reasons)} of {len(numbers)} records can't be used: {shown} Repair them, "
      "or train with Dataset.bad_records = 'replace'."
    )
  if small.num_classes and is_strict:
    raise UserError(
      f"{small.line()}. Add records, exclude these classes, or lower "
      "validate.min_members."
    )
  return report


def _check_index(index: RecordIndex) -> None:
  """Checks that labels and members are of the same data.

  Raises:
    UserError: they are not.
  """
  labels, table = index.labels, index.member_table
  if len(labels) and not 0 <= labels.min() <= labels.max() < index.num_classes:
    raise UserError(
      f"The index has labels from {labels.min()} to {labels.max()} but "
      f"{index.num_classes} classes; delete it and rebuild it with --mode=ingest."
    )
  sizes = np.bincount(labels, minlength=index.num_classes)
  owners = np.repeat(np.arange(index.num_classes), np.diff(table.starts))
  if not np.array_equal(sizes, np.diff(table.starts)) or not np.array_equal(
    labels[table.records], owners
  ):
    raise UserError(
      "The members of the index do not match its labels; delete it and rebuild it "
      "with --mode=ingest."
    )


def _spread(num_all: int, num_wanted: Optional[int]) -> np.ndarray:
  """Returns evenly spaced record numbers from the first to the last."""
  if num_wanted is None or num_wanted >= num_all:
    return np.arange(num_all)
  return np.unique(np.linspace(0, num_all - 1, num_wanted).astype(np.int64))


def _check_records(index: RecordIndex, decoder: Any, numbers: np.ndarray) -> list[str]:
  reasons: list[str] = []
  progress = Progress("validating", "records", len(numbers))
  for first in range(0, len(numbers), _RECORDS_AT_A_TIME):
    some = numbers[first : first + _RECORDS_AT_A_TIME]
    reasons.extend(records.record_errors(index, decoder, some).values())
    progress.advance(len(some))
  progress.finish()
  for reason in reasons:
    logging.warning("%s", reason)
  return reasons


def _write(model_dir: str, report: dict[str, Any]) -> None:
  path = os.path.join(model_dir, VALIDATION_FILE)
  content = json.dumps(report, indent=1, ensure_ascii=False)
  try:
    filesystem.make_folder(model_dir)
    filesystem.write_bytes(path, content.encode(errors="backslashreplace"))
  except OSError as error:
    raise UserError(f"{path} can't be written: {error.strerror}.") from error
