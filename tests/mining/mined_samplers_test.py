"""Samplers of a mining round: pure functions, static shapes and contents."""

from __future__ import annotations

import functools
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

from tests.mining.corpora import example_arrays, write_round
from trainer import mining
from trainer.data.class_sampling import SizeWeights
from trainer.data.index_arrays import members_from_labels
from trainer.data.pipeline import Batches, Shard
from trainer.data.samplers import PKSampler
from trainer.errors import UserError
from trainer.losses.objectives import WithinGroups
from trainer.mining import round
from trainer.mining.mined_samplers import (
  MinedTripletSampler,
  neighbouring_class_sampler,
)

_STEPS = np.arange(200)


class _Index:
  """Classes of unequal sizes."""

  def __init__(self, sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    self.labels = np.random.default_rng(0).permutation(labels)
    self.member_table = members_from_labels(self.labels, len(sizes))


def _groups(mining_round, **options):
  options = {
    **{"groups_per_batch": 6, "positives_per_group": 2, "negatives_per_group": 4},
    **{"seed": 1, **options},
  }
  return MinedTripletSampler(None, mining_round, **options)


@pytest.fixture
def examples(tmp_path):
  return write_round(tmp_path, 40, **example_arrays())


def test_group_has_its_anchor_positives_and_negatives(examples):
  sampler = _groups(examples)
  assert sampler.shape == (6, 7)
  drawn = sampler.batches(_STEPS)
  assert drawn.shape == (200, 6, 7)
  assert drawn.dtype == np.int64
  arrays = examples.arrays
  for group in drawn.reshape(-1, 7):
    anchor, positives, negatives = group[0], group[1:3], group[3:]
    for got, name in ((positives, "positives"), (negatives, "negatives")):
      listed = arrays[name][anchor]
      listed = listed[listed >= 0]
      assert set(got) <= set(listed)
      assert len(set(got)) == min(len(got), len(listed))


def test_each_anchor_is_drawn_once_per_epoch_with_records_in_turn(examples):
  drawn = _groups(examples, groups_per_batch=4).batches(np.arange(5 * 60))
  anchors = drawn[:, :, 0]
  assert all(len(set(batch)) == 4 for batch in anchors)
  for epoch in anchors.reshape(60, 20):
    assert sorted(epoch) == list(range(20))
  for anchor in range(20):
    records, counts = np.unique(drawn[anchors == anchor][:, 3:], return_counts=True)
    assert len(records) == (examples.arrays["negatives"][anchor] >= 0).sum()
    assert counts.max() - counts.min() <= 1


def test_batches_depend_on_round_and_seed(tmp_path, examples):
  other = write_round(tmp_path, 80, **example_arrays())
  one = _groups(examples).batches(_STEPS)
  assert (one != _groups(other).batches(_STEPS)).any()
  assert (one != _groups(examples, seed=2).batches(_STEPS)).any()
  np.testing.assert_array_equal(one, _groups(examples).batches(_STEPS))


def _neighbours(num_classes, num_neighbours, seed=0):
  rng = np.random.default_rng(seed)
  rows = [
    rng.permutation(np.delete(np.arange(num_classes), c))[:num_neighbours]
    for c in range(num_classes)
  ]
  return np.array(rows, np.int32)


def _hard(tmp_path, neighbours, sizes, classes=None, step=40, **options):
  mining_round = write_round(
    tmp_path, step, class_neighbours=neighbours, num_classes=len(sizes)
  )
  options = {"hard_fraction": 0.6, "neighbours_per_seed": 2, **options}
  pk = {"classes_per_batch": 10, "samples_per_class": 3, "seed": 1}
  pk.update({name: options.pop(name) for name in [*pk, "weights"] if name in options})
  index = _Index(sizes)
  sampler = neighbouring_class_sampler(
    index,
    mining_round,
    sampler_fn=functools.partial(PKSampler, **pk),
    classes=classes,
    **options,
  )
  return index, sampler


def _expected_classes(base, neighbours, allowed, *, num_hard, num_seeds, num_drawn):
  """Loops over the seeds, nearest classes first, then over the class stream."""
  seeds = list(base[:num_seeds])
  hoods = {seed: [seed] for seed in seeds}
  taken = set(seeds)
  for rank in range(neighbours.shape[1]):
    for seed in seeds:
      near = neighbours[seed][rank]
      if len(taken) < num_hard and near in allowed and near not in taken:
        taken.add(near)
        hoods[seed].append(near)
  rest = [c for c in base[num_seeds:] if c not in taken]
  hard = [c for seed in seeds for c in hoods[seed]]
  return [*hard, *rest][:num_drawn]


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("weights", [None, SizeWeights(power=0.5)])
def test_fraction_of_the_classes_comes_from_neighbourhoods(tmp_path, is_part, weights):
  rng = np.random.default_rng(3)
  neighbours = _neighbours(30, 6)
  neighbours[rng.random(neighbours.shape) < 0.1] = -1
  sizes = rng.integers(3, 12, 30)
  classes = np.sort(rng.permutation(30)[:22]).astype(np.int32) if is_part else None
  options = {"classes": classes, "weights": weights}
  index, sampler = _hard(tmp_path, neighbours, sizes, **options)
  _, plain = _hard(tmp_path, neighbours, sizes, **options, hard_fraction=0.0)
  allowed = set(range(30) if classes is None else classes)
  drawn, base = sampler.batches(_STEPS), plain.batches(_STEPS)
  assert drawn.shape == (200, 10, 3)
  for batch, plain_batch in zip(drawn, base):
    rows, base_classes = index.labels[batch], index.labels[plain_batch][:, 0]
    for seed in (0, 1):  # Classes of the stream come with their members.
      same = batch[rows[:, 0] == base_classes[seed]]
      np.testing.assert_array_equal(same, plain_batch[[seed]])
    assert (rows == rows[:, :1]).all()
    assert len(set(batch.ravel())) == 30
    assert rows[:, 0].tolist() == _expected_classes(
      base_classes, neighbours, allowed, num_hard=6, num_seeds=2, num_drawn=10
    )


def test_hard_fraction_zero_equals_the_plain_sampler(tmp_path):
  sizes = [5] * 20
  index, sampler = _hard(tmp_path, _neighbours(20, 4), sizes, hard_fraction=0.0)
  plain = PKSampler(index, classes_per_batch=10, samples_per_class=3, seed=1)
  np.testing.assert_array_equal(sampler.batches(_STEPS), plain.batches(_STEPS))


def test_batch_has_all_its_classes_if_neighbourhoods_overlap(tmp_path):
  # All have the same neighbours: the stream fills most of a batch.
  neighbours = np.tile(np.array([0, 1, 2], np.int32), (20, 1))
  index, sampler = _hard(tmp_path, neighbours, [4] * 20, hard_fraction=1.0)
  classes = index.labels[sampler.batches(_STEPS)][:, :, 0]
  assert all(len(set(batch)) == 10 for batch in classes)
  assert all({0, 1, 2} <= set(batch) for batch in classes)


def test_all_members_of_a_class_are_drawn(tmp_path):
  index, sampler = _hard(tmp_path, _neighbours(15, 5), [7] * 15)
  counts = np.bincount(sampler.batches(_STEPS).ravel(), minlength=len(index.labels))
  assert counts.min() > 0


def _both(tmp_path):
  yield _groups(write_round(tmp_path, 8, **example_arrays()))
  yield _hard(tmp_path, _neighbours(30, 6), [5] * 30)[1]


def test_steps_drawn_together_are_those_drawn_alone(tmp_path):
  for sampler in _both(tmp_path):
    together = sampler.batches(np.arange(7, 40))
    for row, step in enumerate(range(7, 40)):
      np.testing.assert_array_equal(sampler.batch(step), together[row])


class _Numbers:
  """Records that contain only their number."""

  labels = np.zeros(200, np.int32)

  def read(self, numbers):
    return [str(number).encode() for number in numbers]


def test_workers_read_disjoint_rows_of_the_batch(tmp_path):
  for sampler in _both(tmp_path):
    batches = Batches(_Numbers(), sampler, lambda rows: tf.strings.to_number(rows))
    parts = [
      batches.dataset(Shard(worker, 1, 2), first_step=11, num_steps=3)
      for worker in range(2)
    ]
    for step, read in enumerate(zip(*parts), 11):
      rows = np.concatenate([batch.record_numbers for batch in read])
      np.testing.assert_array_equal(rows, sampler.batch(step).ravel())


def test_within_groups_accepts_groups_of_the_same_size(examples):
  group = _groups(examples).group
  WithinGroups(num_positives=2, num_negatives=4).check_groups(group, "a sampler")
  with pytest.raises(UserError, match=r"of OfflineMining\.sampler_fn have 2 and 4"):
    WithinGroups().check_groups(group, "OfflineMining.sampler_fn")


def test_triplet_list_of_a_round_follows_the_documented_recipe(tmp_path, examples):
  page = (pathlib.Path(mining.__file__).parent / "README.md").read_text()
  [recipe] = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
  folder = round.round_path(str(tmp_path), 40)
  said = recipe.replace("runs/one/mining/round-00002000", folder)
  exec(said.replace("triplets.npy", str(tmp_path / "triplets.npy")), {})
  listed = np.load(tmp_path / "triplets.npy")
  assert len(listed) == np.count_nonzero(examples.arrays["negatives"] >= 0)
  for anchor, positive, negative in listed:
    assert positive == examples.arrays["positives"][anchor][0]
    assert negative in examples.arrays["negatives"][anchor]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"groups_per_batch": 21}, "groups_per_batch=21 exceeds the 20 anchors"),
    ({"negatives_per_group": 0}, "negatives_per_group=0 must each"),
  ],
)
def test_invalid_groups_are_refused(examples, options, message):
  with pytest.raises(UserError, match=message):
    _groups(examples, **options)


def test_round_without_the_required_arrays_is_refused(tmp_path, examples):
  with pytest.raises(UserError, match="no neighbours of classes; set"):
    neighbouring_class_sampler(
      _Index([3] * 9),
      examples,
      sampler_fn=PKSampler,
      hard_fraction=0.5,
      neighbours_per_seed=1,
    )
  classes_alone = write_round(tmp_path, 80, class_neighbours=_neighbours(9, 2))
  with pytest.raises(UserError, match="no examples for MinedTripletSampler"):
    _groups(classes_alone)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hard_fraction": 1.5}, "hard_fraction=1.5"),
    ({"neighbours_per_seed": 0}, "neighbours_per_seed=0"),
    ({"classes_per_batch": 31}, "classes_per_batch=31 exceeds the 30 available"),
  ],
)
def test_invalid_hard_classes_are_refused(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    _hard(tmp_path, _neighbours(30, 4), [3] * 30, **options)
