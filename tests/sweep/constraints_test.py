from __future__ import annotations

import pytest

from trainer.config.gin_statements import Reference
from trainer.errors import UserError
from trainer.sweep.spec import Constraint

VALUES = {"P": 4, "PKSampler.samples_per_class": 16, "TrainStep.loss": "x"}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("P * PKSampler.samples_per_class == 64", True),
    ("P * PKSampler.samples_per_class < 64", False),
    ("10 < P + PKSampler.samples_per_class <= 20", True),
    ("P // 3 == 1 and P % 3 == 1 and P / 8 == 0.5", True),
    ("P == 5 or not P != 4", True),
    ("P - 5 == -1", True),
    ("P in (2, 4)", True),
    ("P not in [2, 4]", False),
  ],
)
def test_condition_is_arithmetic_over_gin_names(text, expected):
  assert Constraint(text, VALUES).holds(VALUES) is expected


def test_part_is_compared_by_its_name():
  values = {"TrainStep.loss": Reference((), "TripletLoss", True)}
  constraint = Constraint("TrainStep.loss == 'TripletLoss'", values)
  assert constraint.holds(values)
  assert not constraint.holds({"TrainStep.loss": Reference((), "CircleLoss", True)})


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("P ==", ["is no expression"]),
    ("P * sample_per_class == 1", ["sample_per_class is not swept"]),
    ("PKSampler.sample_per_class", ["did you mean 'PKSampler.samples_per_class'?"]),
    ("open('x')", ["more than arithmetic"]),
    ("P ** 9", ["more than arithmetic"]),
    ("P < 'a'", ["'<' not supported"]),
    ("P / 0", ["division by zero"]),
  ],
)
def test_what_is_no_condition_is_refused(text, words):
  with pytest.raises(UserError) as caught:
    Constraint(text, VALUES)
  assert "sweep.constraints" in str(caught.value)
  assert all(word in str(caught.value) for word in words)
