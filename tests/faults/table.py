"""The fault table: injected fault, expected outcome and observed outcome.

A row is a function of `Runs` that returns an `Outcome`. The table prints its name and
docstring.
"""

from __future__ import annotations

import inspect
from typing import Callable, NamedTuple, Optional

from tests.faults.runs import Runs


class Outcome(NamedTuple):
  """The outcome of a fault.

  Attributes:
    expected: description.
    seen: description; equal to `expected` on success.
    seconds: from the fault to the exit of the affected process.
    lost_steps: repeated steps; None if not applicable.
  """

  expected: str
  seen: str
  seconds: float
  lost_steps: Optional[int] = None


RowFn = Callable[[Runs], Outcome]
ROWS: dict[str, RowFn] = {}


def row(row_fn: RowFn) -> RowFn:
  """Registers a function in the table."""
  ROWS[row_fn.__name__] = row_fn
  return row_fn


def fault_and_place(row_fn: RowFn) -> tuple[str, str]:
  """Returns the two columns in a row's docstring: "fault; where"."""
  fault, place = (inspect.getdoc(row_fn) or "").rstrip(".").split("; ", 1)
  return fault, place


def line(columns) -> str:
  """Returns a row as text."""
  widths = (30, 34, 52, 52, 9, 5)
  return " | ".join(f"{text!s:<{width}}" for text, width in zip(columns, widths))


def header() -> str:
  """Returns the header of the table."""
  return line(("fault", "where", "expected", "seen", "seconds", "lost"))


def as_text(name: str, outcome: Outcome) -> str:
  """Returns an outcome as a row of the table."""
  lost = "-" if outcome.lost_steps is None else outcome.lost_steps
  columns = (*fault_and_place(ROWS[name]), outcome.expected, outcome.seen)
  return line((*columns, f"{outcome.seconds:.2f}", lost))
