from __future__ import annotations

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.losses.softmax import LearnedTemperature, temperature_value


def test_learned_temperature_starts_where_it_is_told():
  np.testing.assert_allclose(temperature_value(LearnedTemperature(initial=0.07)), 0.07)


def test_learned_temperature_has_one_trainable_variable():
  assert len(LearnedTemperature(initial=0.07).trainable_variables) == 1


def test_learned_temperature_never_falls_to_zero():
  temperature = LearnedTemperature(initial=0.07)
  temperature.trainable_variables[0].assign_sub(20.0)
  assert temperature().numpy() > 0


@pytest.mark.parametrize("initial", [0, -0.1])
def test_temperature_not_above_zero_is_refused(initial):
  with pytest.raises(UserError, match="not above 0"):
    LearnedTemperature(initial=initial)
