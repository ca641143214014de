"""What the folders of runs hold, read for a page."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Optional

from trainer.config import saved
from trainer.errors import UserError
from trainer.loop.metrics_file import MetricsFile
from trainer.report import moments
from trainer.retrieval.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
  """A run with results.

  Attributes:
    name: its folder's, or its path where folders of one name are compared.
    model_dir: its folder.
    latest: what was measured last.
    rows: of `metrics.jsonl`.
    config: values by path.
    evidence: None where none was collected.
  """

  name: str
  model_dir: str
  latest: moments.Moment
  rows: Sequence[Mapping[str, float]]
  config: Mapping[str, str]
  evidence: Optional[Evidence]


def read_config(model_dir: str) -> str:
  """The text of the run's config.

  Args:
    model_dir: folder of the run.

  Raises:
    UserError: the folder is missing or holds no run.
  """
  try:
    with open(os.path.join(model_dir, saved.CONFIG), encoding="utf-8") as file:
      return file.read()
  except (FileNotFoundError, NotADirectoryError) as error:
    is_folder = os.path.isdir(model_dir)
    what = f"holds no {saved.CONFIG}, so no run" if is_folder else "is no folder"
    raise UserError(f"{model_dir} {what}; give the model_dir of a run.") from error


def read_measured(model_dirs: Sequence[str]) -> list[MeasuredRun]:
  """The runs of folders, in order.

  Args:
    model_dirs: their folders.

  Raises:
    UserError: fewer than two folders, or one twice; one that holds no run, or a run
      without results.
  """
  paths = [os.path.abspath(folder) for folder in model_dirs]
  if len(paths) < 2:
    raise UserError(f"{len(paths)} folders given; two runs or more can be compared.")
  twice = [path for path, number in collections.Counter(paths).items() if number > 1]
  if twice:
    raise UserError(f"{twice[0]} is given twice; give each run once.")
  bases = collections.Counter(os.path.basename(path) for path in paths)
  return [
    _read(folder, base if bases[base] == 1 else os.path.normpath(folder))
    for folder, base in zip(model_dirs, map(os.path.basename, paths))
  ]


def differing_paths(runs: Sequence[MeasuredRun]) -> list[str]:
  """Paths of the config whose values are not the same in all runs, sorted.

  Args:
    runs: two or more.
  """
  paths = sorted({path for run in runs for path in run.config})
  return [p for p in paths if len({run.config.get(p) for run in runs}) > 1]


def _read(model_dir: str, name: str) -> MeasuredRun:
  read_config(model_dir)
  measured = moments.read(model_dir)
  if moments.LATEST not in measured:
    raise UserError(
      f"{model_dir} has no results after training; run --mode=evaluate on it first."
    )
  return MeasuredRun(
    name=name,
    model_dir=model_dir,
    latest=measured[moments.LATEST],
    rows=list(MetricsFile(model_dir).rows()),
    config=saved.read_values(model_dir) or {},
    evidence=Evidence.read(model_dir),
  )
