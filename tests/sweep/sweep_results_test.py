from __future__ import annotations

import pytest

from trainer.sweep import sweep_results
from trainer.sweep.sweep_results import RunRow, SweepRow


def row(value, **settings):
  run = RunRow(None, "", "finished", 1, value, "")
  return SweepRow({name: str(v) for name, v in settings.items()}, [run])


def test_name_that_explains_all_has_share_one_and_the_other_none():
  rows = [row(float(a), a=a, b=b) for a in (1, 2) for b in (1, 2)]
  assert sweep_results.importances(rows) == {"a": 1.0, "b": 0.0}


def test_shares_of_an_addition_are_those_of_its_terms():
  # 3a + b: variances 9 : 1.
  rows = [row(3.0 * a + b, a=a, b=b) for a in (0, 1) for b in (0, 1)]
  assert sweep_results.importances(rows) == pytest.approx({"a": 0.9, "b": 0.1})


def test_what_only_two_names_do_together_is_nobodys():
  rows = [row(float(a != b), a=a, b=b) for a in (0, 1) for b in (0, 1)]
  assert sweep_results.importances(rows) == {"a": 0.0, "b": 0.0}


def test_numbers_of_a_range_are_grouped_by_quarters():
  rows = [row(i // 10, a=i / 10, b=(7 * i) % 40 / 40) for i in range(40)]
  shares = sweep_results.importances(rows)
  assert shares["a"] == 1.0
  assert shares["b"] < 0.3


def test_nothing_is_said_of_settings_that_do_not_differ():
  assert sweep_results.importances([row(1.0, a=1), row(1.0, a=2)]) == {}
  assert sweep_results.importances([row(1.0, a=1)]) == {}
