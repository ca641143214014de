"""Rows of a sweep, and their page."""

from __future__ import annotations

import types

from trainer.config.run_config import Config
from trainer.sweep import sweep_results
from trainer.sweep.points import Point
from trainer.sweep.spec import SweepOptions
from trainer.sweep.sweep_results import RunRow, SweepRow


def row(settings, *values, note=""):
  """Returns a row with a run per seed.

  Args:
    settings: as written in gin, by name.
    *values: of the metric, by seed; None for a failed run.
    note: why runs failed.
  """
  runs = [
    RunRow(
      Point(settings, seed, Config("", {})),
      f"points/{'-'.join(settings.values())}-{seed}",
      "failed" if value is None else "finished",
      10,
      value,
      note if value is None else "",
    )
    for seed, value in enumerate(values, 1)
  ]
  return SweepRow(settings, runs)


def write_page(rows, path, *, name="mine", metric="eval/map_at_r"):
  """Writes the page of rows, sorted best first."""
  options = SweepOptions(metric=metric, seeds=(1, 2))
  spec = types.SimpleNamespace(name=name, options=options)
  sweep_results.write_sweep_page(rows, spec, str(path))
