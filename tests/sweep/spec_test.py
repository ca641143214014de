from __future__ import annotations

import itertools
import math

import pytest

from trainer.config.gin_statements import Binding, Reference
from trainer.errors import UserError
from trainer.sweep import spec
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


def test_parts_are_compared_by_name():
  values = {"TrainStep.loss": Reference((), "TripletLoss", True)}
  constraint = Constraint("TrainStep.loss == 'TripletLoss'", values)
  assert constraint.holds(values)
  assert not constraint.holds({"TrainStep.loss": Reference((), "CircleLoss", True)})


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("P ==", ["is not an expression"]),
    ("P * sample_per_class == 1", ["sample_per_class is not swept"]),
    ("PKSampler.sample_per_class", ["did you mean 'PKSampler.samples_per_class'?"]),
    ("open('x')", ["more than arithmetic"]),
    ("P ** 9", ["more than arithmetic"]),
    ("P < 'a'", ["'<' not supported"]),
    ("P / 0", ["division by zero"]),
  ],
)
def test_invalid_condition_is_refused(text, words):
  with pytest.raises(UserError) as caught:
    Constraint(text, VALUES)
  assert "sweep.constraints" in str(caught.value)
  assert all(word in str(caught.value) for word in words)


def _read(kind, value):
  return spec.read_domain(Binding(kind, "MARGIN", "", value, "mine.gin:3"))


def test_grid_of_a_choice_is_every_value():
  assert _read("choice", (1, "two", None)).grid() == [1, "two", None]


def test_grid_of_a_range_is_evenly_spaced_with_both_ends():
  assert _read("range", (0.0, 1.0, 5)).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_grid_of_a_log_range_has_a_constant_ratio():
  assert _read("log_range", (1e-4, 1e-1, 4)).grid() == pytest.approx(
    [1e-4, 1e-3, 1e-2, 1e-1]
  )


def test_integer_bounds_give_distinct_integers():
  assert _read("range", (1, 3, 5)).grid() == [1, 2, 3]
  assert _read("log_range", (1, 64, 4)).grid() == [1, 4, 16, 64]


def _draw(domain, count):
  drawn = spec.random_values({"MARGIN": domain}, seed=1)
  return [values["MARGIN"] for values in itertools.islice(drawn, count)]


def test_samples_of_a_log_range_are_even_in_the_logarithm():
  values = _draw(_read("log_range", (1e-4, 1.0)), 2000)
  logs = [math.log10(value) for value in values]
  below = sum(value < -2 for value in logs)
  assert min(logs) >= -4
  assert max(logs) <= 0
  assert 900 < below < 1100
  assert all(value == float(f"{value:.4g}") for value in values)


def test_samples_of_a_range_stay_within_it():
  assert set(_draw(_read("range", (2, 6)), 300)) == {2, 3, 4, 5, 6}
  narrow = _draw(_read("range", (0.123456, 0.123457)), 10)
  assert all(0.123456 <= value <= 0.123457 for value in narrow)


def test_samples_of_a_choice_are_its_values():
  reference = Reference((), "TripletLoss", True)
  values = _draw(_read("choice", (reference, 1, None)), 100)
  assert {repr(value) for value in values} == {repr(reference), "1", "None"}
  assert reference in values


@pytest.mark.parametrize(
  ("kind", "value", "words"),
  [
    ("choices", (1, 2), ["'choices' is not one of", "did you mean 'choice'?"]),
    ("choice", (), ["needs a list"]),
    ("choice", 0.5, ["needs a list"]),
    ("range", (1,), ["(low, high)", "(1,)"]),
    ("range", (2, 1), ["low below high"]),
    ("range", ("a", "b"), ["numbers"]),
    ("range", (0, float("inf")), ["numbers"]),
    ("range", (0.0, 1.0, 0), ["at least 1"]),
    ("log_range", (0.0, 1.0), ["low above 0"]),
  ],
)
def test_invalid_domain_is_refused_with_its_location(kind, value, words):
  with pytest.raises(UserError) as caught:
    _read(kind, value)
  assert str(caught.value).startswith("mine.gin:3: ")
  assert all(word in str(caught.value) for word in words)
