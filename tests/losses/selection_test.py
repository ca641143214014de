from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.loss_terms import PairMasks
from trainer.losses.triplet import NEGATIVES, POSITIVES, DistanceWeightedNegatives

_DISTANCES = tf.constant([[0.0, 1.0, 1.5, 1.2, 3.0, 1.2]])
_PAIRS = PairMasks(
  tf.constant([[False, True, True, False, False, False]]),
  tf.constant([[False, False, False, True, True, True]]),
)
_NONE = PairMasks(*(tf.zeros_like(each) for each in _PAIRS[:2]))


@pytest.mark.parametrize(
  ("name", "expected"),
  [("all", [1, 1]), ("hardest", [0, 1]), ("easiest", [1, 0])],
)
def test_positives_are_chosen_by_distance(name, expected):
  weights = POSITIVES[name](_DISTANCES, _PAIRS)
  np.testing.assert_array_equal(weights, [[0, *expected, 0, 0, 0]])


@pytest.mark.parametrize(
  ("name", "positive", "expected"),
  [
    ("all", 1.0, [1, 1, 1]),
    ("hardest", 1.0, [0.5, 0, 0.5]),
    ("semi_hard_of_pair", 1.0, [0.5, 0, 0.5]),
    ("semi_hard_of_pair", 1.2, [0, 1, 0]),
    ("semi_hard_of_pair", 5.0, [0, 1, 0]),
    ("semi_hard_of_anchor", 1.0, [0, 1, 0]),
  ],
)
def test_negatives_are_chosen_by_distance_and_ties_share(name, positive, expected):
  weights = NEGATIVES[name](_DISTANCES, _PAIRS, tf.constant([[positive]]))
  np.testing.assert_array_equal(weights, [[0, 0, 0, *expected]])


@pytest.mark.parametrize("name", POSITIVES)
def test_anchor_without_a_positive_selects_none(name):
  assert not POSITIVES[name](_DISTANCES, _NONE).numpy().any()


@pytest.mark.parametrize("name", NEGATIVES)
def test_anchor_without_a_negative_selects_none(name):
  assert not NEGATIVES[name](_DISTANCES, _NONE, tf.constant([[1.0]])).numpy().any()


def test_distance_weighted_negatives_are_probabilities_in_high_dimensions():
  weights = DistanceWeightedNegatives(num_dimensions=2048)(_DISTANCES, _PAIRS, None)
  np.testing.assert_allclose(weights, [[0, 0, 0, 0.5, 0, 0.5]])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_dimensions": 2}, "num_dimensions=2 is below 3"),
    ({"num_dimensions": 8, "nearest": 1.5}, "nearest=1.5 and farthest=1.4"),
  ],
)
def test_distances_beyond_the_unit_sphere_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    DistanceWeightedNegatives(**arguments)
