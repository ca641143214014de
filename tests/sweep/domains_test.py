from __future__ import annotations

import math
import random

import pytest

from trainer.config.gin_statements import Binding
from trainer.errors import UserError
from trainer.sweep import spec


def _read(kind, value):
  return spec.read_domain(Binding(kind, "MARGIN", "", value, "mine.gin:3"))


def test_grid_of_a_choice_is_every_value():
  assert _read("choice", (1, "two", None)).grid() == [1, "two", None]


def test_grid_of_a_range_is_evenly_spaced_with_both_ends():
  assert _read("range", (0.0, 1.0, 5)).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_grid_of_a_log_range_has_one_ratio():
  assert _read("log_range", (1e-4, 1e-1, 4)).grid() == pytest.approx(
    [1e-4, 1e-3, 1e-2, 1e-1]
  )


def test_whole_ends_give_whole_numbers_each_once():
  assert _read("range", (1, 3, 5)).grid() == [1, 2, 3]
  assert _read("log_range", (1, 64, 4)).grid() == [1, 4, 16, 64]


def test_samples_of_a_log_range_are_even_in_the_logarithm():
  domain, generator = _read("log_range", (1e-4, 1.0)), random.Random(1)
  logs = [math.log10(domain.sample(generator)) for _ in range(2000)]
  below = sum(value < -2 for value in logs)
  assert min(logs) >= -4
  assert max(logs) <= 0
  assert 900 < below < 1100


def test_samples_of_a_range_stay_within_it():
  domain, generator = _read("range", (2, 6)), random.Random(1)
  assert {domain.sample(generator) for _ in range(300)} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
  ("kind", "value", "words"),
  [
    ("choices", (1, 2), ["'choices' is none of", "did you mean 'choice'?"]),
    ("choice", (), ["needs a list"]),
    ("choice", 0.5, ["needs a list"]),
    ("range", (1,), ["(low, high)", "(1,)"]),
    ("range", (2, 1), ["low below high"]),
    ("range", ("a", "b"), ["numbers"]),
    ("range", (0, float("inf")), ["numbers"]),
    ("range", (0.0, 1.0, 0), ["at least one"]),
    ("log_range", (0.0, 1.0), ["low above 0"]),
  ],
)
def test_domain_that_cannot_be_is_refused_with_its_place(kind, value, words):
  with pytest.raises(UserError) as caught:
    _read(kind, value)
  assert str(caught.value).startswith("mine.gin:3: ")
  assert all(word in str(caught.value) for word in words)
