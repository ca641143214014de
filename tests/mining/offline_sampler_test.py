"""The sampler that goes over from one round to the next."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from tests.mining.deciding import Constant
from trainer.mining.offline_mining import PiecewiseSampler


def test_steps_of_several_rounds_are_drawn_together():
  sampler = PiecewiseSampler(Constant(0))
  sampler.hold(4, Constant(1, (6, 2)))
  drawn = sampler.batches(np.array([9, 0, 3, 4]))
  assert drawn.shape == (4, 3, 4)
  assert drawn[:, 2, 1].tolist() == [1, 0, 0, 1]


def test_the_sampler_that_holds_and_the_one_before_are_kept():
  sampler, held = PiecewiseSampler(Constant(0)), []
  for number in (1, 2, 3):
    held.append(Constant(number))
    sampler.hold(10 * number, held[-1])
  held = [weakref.ref(each) for each in held]
  gc.collect()
  assert [each() is None for each in held] == [True, False, False]
  assert sampler.batches(np.array([29, 30]))[:, 0, 0].tolist() == [2, 3]
  with pytest.raises(ValueError, match="from step 20 on are kept; got 19"):
    sampler.batches(np.array([30, 19]))
