"""Weighted class sampling: frequencies per epoch, distinct classes per step."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from trainer.data.class_sampling import EqualClasses, SizeWeights, WeightedClasses
from trainer.data.index_arrays import members_from_labels
from trainer.data.samplers import PKSampler
from trainer.errors import UserError


def test_classes_are_drawn_in_proportion_to_their_weight():
  draws_per_epoch = np.random.default_rng(0).integers(1, 4, 300)
  stream = WeightedClasses(draws_per_epoch, 4, seed=5)
  num_steps = int(draws_per_epoch.sum())  # Four epochs.
  drawn = stream.draw(np.arange(num_steps)).classes
  counts = np.bincount(drawn.ravel(), minlength=300)
  # About 1 in 80 draws is replaced by another class.
  assert np.abs(counts - 4 * draws_per_epoch).mean() < 0.3
  assert np.corrcoef(counts, draws_per_epoch)[0, 1] > 0.97


def test_classes_of_a_step_are_distinct_even_if_one_dominates():
  stream = WeightedClasses(np.array([1000, 1, 1, 1, 1]), 4, seed=0)
  classes = stream.draw(np.arange(200)).classes
  assert all(len(set(row)) == 4 for row in classes.tolist())
  assert (classes == 0).any(axis=1).mean() > 0.95


def test_each_block_of_a_class_is_drawn_once():
  draws_per_epoch = np.random.default_rng(1).integers(1, 6, 2000)
  draws = WeightedClasses(draws_per_epoch, 2, seed=1).draw(
    np.arange(int(draws_per_epoch.sum()))
  )
  blocks = collections.Counter(zip(draws.classes.ravel(), draws.blocks.ravel()))
  assert max(blocks.values()) == 1
  in_two_epochs = sum(block < 2 * draws_per_epoch[c] for c, block in blocks)
  assert in_two_epochs > 0.99 * 2 * draws_per_epoch.sum()


@pytest.mark.parametrize(
  "stream", [EqualClasses(7, 3, 2), WeightedClasses(np.arange(1, 8), 3, 2)]
)
def test_steps_drawn_together_equal_steps_drawn_alone(stream):
  together = stream.draw(np.arange(5, 40))
  for row, step in enumerate(range(5, 40)):
    alone = stream.draw(np.array([step]))
    np.testing.assert_array_equal(alone.classes[0], together.classes[row])
    np.testing.assert_array_equal(alone.blocks[0], together.blocks[row])


def test_epoch_with_power_one_has_every_record_once():
  sizes = [4, 8, 16, 2, 40, 12]
  table = members_from_labels(np.repeat(np.arange(6), sizes).astype(np.int32), 6)
  sampler = PKSampler(
    table, classes_per_batch=1, samples_per_class=2, seed=0, weights=SizeWeights()
  )
  num_steps = sum(sizes) // 2
  records = sampler.batches(np.arange(num_steps)).ravel()
  assert sorted(records.tolist()) == list(range(sum(sizes)))


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [1, 1, 2, 25]),
    ({"max_size": 10}, [1, 1, 2, 3]),
    ({"power": 0.0}, [16, 16, 16, 16]),
    ({"power": 0.5}, [8, 16, 23, 80]),
  ],
)
def test_weights_depend_on_the_class_size(options, expected):
  draws_per_epoch = SizeWeights(**options).draws_per_epoch(np.array([1, 4, 8, 100]), 4)
  assert draws_per_epoch.tolist() == expected


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SizeWeights(power=1.5), r"power=1\.5 must be between"),
    (lambda: SizeWeights(max_size=0), "max_size=0 must be at least 1"),
    (
      lambda: SizeWeights().draws_per_epoch(np.array([2**32, 1]), 1),
      "the 2,147,483,647 allowed",
    ),
  ],
)
def test_invalid_weights_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
