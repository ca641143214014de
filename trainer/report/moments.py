"""`eval/metrics.json` as a page reads it: an older file may lack much of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from trainer.errors import UserError
from trainer.retrieval.results import Results

BEFORE, LATEST = "before_training", "latest"


class Value(NamedTuple):
  """One metric at one moment.

  Attributes:
    value: of the metric.
    interval: lower and upper end, at 95 %; None where none was computed.
  """

  value: float
  interval: Optional[tuple[float, float]]

  @property
  def is_share(self) -> bool:
    """Whether it lies between 0 and 1 and is no count."""
    return isinstance(self.value, float) and 0.0 <= self.value <= 1.0

  def text(self) -> str:
    """The value as it is written in a table."""
    return f"{self.value:.4f}" if isinstance(self.value, float) else f"{self.value:,}"

  def interval_text(self, separator: str) -> str:
    """The interval as it is written in a table; empty if there is none.

    Args:
      separator: stands between its ends.
    """
    return separator.join(f"{end:.4f}" for end in self.interval or ())


class Moment:
  """What was measured once.

  Attributes:
    step: steps of training before it.
    values: of each metric that is a finite number.
    worst_classes: rows of the table by class, worst first.

  Args:
    content: one entry of the file.
  """

  def __init__(self, content: Mapping[str, Any]):
    self.step = int(content.get("step", 0))
    intervals = content.get("intervals", {})
    self.values = {
      name: Value(value, _pair(intervals.get(name)))
      for name, value in content.items()
      if name.startswith("eval/") and _is_number(value)
    }
    self.worst_classes: list[Mapping[str, Any]] = content.get("worst_classes", [])


def read(model_dir: str) -> dict[str, Moment]:
  """The moments of a run, by name; none where nothing was measured.

  Args:
    model_dir: folder of the run.

  Raises:
    UserError: the file is damaged.
  """
  try:
    by_moment = Results(model_dir).by_moment
    return {
      name: Moment(by_moment[name]) for name in (BEFORE, LATEST) if name in by_moment
    }
  except (AttributeError, TypeError) as error:
    raise UserError(
      f"{model_dir}/eval/metrics.json can't be read ({error}); measure again with "
      "--mode=evaluate."
    ) from error


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _pair(interval: Any) -> Optional[tuple[float, float]]:
  return (float(interval[0]), float(interval[1])) if interval else None
