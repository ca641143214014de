"""Marks rows of a table as thorough: the check leaves them out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thorough_except(kept: Collection[Any], rows: Iterable[Any]) -> list[Any]:
  """Returns rows for `pytest.mark.parametrize`, thorough unless they are in `kept`.

  Args:
    kept: some of the rows, at least one of each kind.
    rows: values, or tuples where a test has several parameters.
  """
  rows = list(rows)
  assert all(row in rows for row in kept), kept
  return [
    row if row in kept else pytest.param(*_values(row), marks=pytest.mark.thorough)
    for row in rows
  ]


def _values(row: Any) -> tuple[Any, ...]:
  return row if isinstance(row, tuple) else (row,)
