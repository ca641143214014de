from __future__ import annotations

import pytest

from trainer.tpu_check import compile_check


@pytest.mark.parametrize(
  ("start", "unit", "limit", "expected"),
  [
    (64, 4, 100, 100),
    (64, 4, 103, 100),
    (64, 4, 63, 60),
    (64, 4, 4, 4),
    (64, 4, 3, None),
    (6, 4, 9, 8),
    (2, 4, 5, 4),
    (8, 8, 10**9, 8 * compile_check.MAX_FACTOR),
    (12, 4, 12 * compile_check.MAX_FACTOR - 1, 12 * compile_check.MAX_FACTOR - 4),
  ],
)
def test_the_largest_multiple_that_fits_is_found(start, unit, limit, expected):
  assert (
    compile_check.largest_fitting_batch(
      lambda number: number <= limit, start, unit=unit
    )
    == expected
  )


def test_nothing_is_tried_twice_and_only_multiples_are():
  tried = []

  def fits(number):
    tried.append(number)
    return number <= 1000

  assert compile_check.largest_fitting_batch(fits, 64, unit=4) == 1000
  assert len(set(tried)) == len(tried) < 15
  assert not any(number % 4 for number in tried)
