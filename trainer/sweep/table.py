"""The table of a sweep in the terminal, redrawn in place while it runs."""

from __future__ import annotations

import collections
import shutil
import sys
from collections.abc import Sequence

from trainer.sweep import rows as rows_lib
from trainer.sweep.rows import Row

_NUM_SHOWN = 10


def text(rows: Sequence[Row], metric: str, num_shown: int = _NUM_SHOWN) -> str:
  """The best rows, those that run or have failed, and how many there are of each state.

  Args:
    rows: best first.
    metric: title of the value.
    num_shown: the most rows.
  """
  busy = [row for row in rows if row.mean is None and _state(row) != rows_lib.WAITING]
  shown = [row for row in rows if row.mean is not None][:num_shown] + busy[:num_shown]
  swept = rows_lib.names(rows)
  head = [
    "",
    *(rows_lib.short_name(name, swept) for name in swept),
    metric,
    "± seeds",
    "",
  ]
  cells = [head] if shown else []
  for rank, row in enumerate(shown, 1):
    cells.append(
      [
        str(rank) if row.mean is not None else "",
        *(rows_lib.short_value(row.settings.get(name, "-")) for name in swept),
        "" if row.mean is None else f"{row.mean:.4f}",
        "" if row.spread is None else f"{row.spread:.4f} ({len(row.values)})",
        _state(row),
      ]
    )
  widths = (
    [max(len(row[i]) for row in cells) for i in range(len(head))] if cells else []
  )
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in cells
  ]
  return "\n".join([*lines, counts(rows)])


def counts(rows: Sequence[Row]) -> str:
  """How many runs there are, of each state."""
  states = collections.Counter(run.state for row in rows for run in row.runs)
  words = ", ".join(f"{number} {state}" for state, number in states.most_common())
  return f"{sum(states.values())} runs: {words}"


class LiveTable:
  """Draws the table over itself on a terminal; elsewhere a line when counts change."""

  def __init__(self, metric: str):
    self._metric = metric
    self._num_lines = 0
    self._last = ""

  def show(self, rows: Sequence[Row]) -> None:
    """Shows how far the sweep is."""
    if not sys.stderr.isatty():
      line = counts(rows)
      if line != self._last:
        print(line, file=sys.stderr, flush=True)
      self._last = line
      return
    width = shutil.get_terminal_size().columns
    lines = [line[: width - 1] for line in text(rows, self._metric).splitlines()]
    up = f"\x1b[{self._num_lines}A" if self._num_lines else ""
    sys.stderr.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
    sys.stderr.flush()
    self._num_lines = len(lines)


def _state(row: Row) -> str:
  """What its runs do, as far as they have not finished."""
  words = []
  for run in row.runs:
    if run.state == rows_lib.RUNNING:
      words.append(f"running, step {run.step}/{run.point.num_steps}")
    elif run.state == rows_lib.FAILED:
      words.append(f"failed, {run.note}")
    elif run.state == rows_lib.HALF_DONE:
      words.append(f"half done, step {run.step}/{run.point.num_steps}")
  return "; ".join(words) or (rows_lib.WAITING if row.mean is None else "")
