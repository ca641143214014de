"""How much each swept name matters: the share of the spread that it explains.

The settings are grouped by their values of one name; the share is the sum of squares
between the groups' means over the whole sum of squares (eta squared, the main effect in
an analysis of variance). What only two names together do is nobody's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from trainer.sweep.rows import Row, names

_NUM_GROUPS = 4  # Of a name that nearly every point gives another value.


def importances(rows: Sequence[Row]) -> dict[str, float]:
  """The share of each swept name, the greatest first.

  Args:
    rows: of any order; those without value are left out.

  Returns:
    By name, 0 to 1; empty where fewer than two settings have a value, or all the same.
  """
  finished = [row for row in rows if row.mean is not None]
  means = [row.mean or 0.0 for row in finished]
  if len(means) < 2 or max(means) == min(means):
    return {}
  middle = statistics.fmean(means)
  total = sum((mean - middle) ** 2 for mean in means)
  shares = {}
  for name in names(finished):
    groups: dict[object, list[float]] = {}
    for group, mean in zip(
      _groups([r.settings.get(name, "") for r in finished]), means
    ):
      groups.setdefault(group, []).append(mean)
    between = sum(len(g) * (statistics.fmean(g) - middle) ** 2 for g in groups.values())
    shares[name] = between / total
  return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _groups(values: Sequence[str]) -> Sequence[object]:
  """The group of each value: the value itself, or its quarter of the order."""
  distinct = set(values)
  if len(distinct) <= max(_NUM_GROUPS, len(values) // 2):
    return values
  try:
    order = sorted(distinct, key=float)
  except ValueError:
    return values
  place = {value: _NUM_GROUPS * i // len(order) for i, value in enumerate(order)}
  return [place[value] for value in values]
