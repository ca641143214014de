from __future__ import annotations

import random

import pytest

from trainer.sweep import sweep_results
from trainer.sweep.sweep_results import RunRow, SweepRow


def row(value, **settings):
  run = RunRow(None, "", "finished", 1, value, "")
  return SweepRow({name: str(v) for name, v in settings.items()}, [run])


def test_sole_influential_setting_has_nearly_all_importance():
  rows = [row(float(a), a=a, b=b) for a in range(5) for b in range(5)]
  shares = sweep_results.importances(rows)
  assert list(shares) == ["a", "b"]
  assert shares["a"] > 0.97
  assert shares["b"] < 0.03


def test_importances_of_a_sum_are_those_of_its_terms():
  # 3a + b: variances 9 : 1, which the forest underestimates for the smaller term.
  rows = [row(3.0 * a + b, a=a, b=f"'{b}'") for a in range(6) for b in range(6)]
  shares = sweep_results.importances(rows)
  assert shares["a"] == pytest.approx(0.9, abs=0.05)
  assert shares["b"] == pytest.approx(0.1, abs=0.05)


def test_interaction_is_attributed_to_neither_setting():
  rows = [row(float((a < 3) != (b < 3)), a=a, b=b) for a in range(6) for b in range(6)]
  assert sum(sweep_results.importances(rows).values()) < 0.5


def test_irrelevant_setting_has_a_small_importance_in_a_random_search():
  generator = random.Random(0)
  rows = []
  for _ in range(40):
    a, b = generator.random(), generator.random()
    rows.append(row(a, a=a, b=b))
  shares = sweep_results.importances(rows)
  assert shares["a"] > 0.95
  assert shares["b"] < 0.05


def test_unused_setting_is_a_separate_value():
  rows = [row(1.0, loss="@A()", margin=m) for m in (0.1, 0.2)]
  rows += [row(0.0, loss="@B()"), row(0.1, loss="@B()", other=1)]
  assert set(sweep_results.importances(rows)) == {"loss", "margin", "other"}


def test_importances_are_the_same_in_each_call():
  rows = [row(float(a * b), a=a, b=b) for a in range(4) for b in range(4)]
  assert sweep_results.importances(rows) == sweep_results.importances(rows)


def test_constant_settings_have_no_importance():
  assert sweep_results.importances([row(1.0, a=1), row(1.0, a=2)]) == {}
  assert sweep_results.importances([row(1.0, a=1)]) == {}
