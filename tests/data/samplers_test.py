"""Guarantees of samplers, checked by counting their draws."""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest

from trainer.data.index_arrays import MemberTable, members_from_labels
from trainer.data.samplers import (
  GroupedSampler,
  HardClassSampler,
  PKSampler,
  SequentialSampler,
  SingletonSampler,
)
from trainer.errors import UserError


def _table(sizes):
  return members_from_labels(
    np.repeat(np.arange(len(sizes)), sizes).astype(np.int32), len(sizes)
  )


def _sampler(sizes, classes_per_batch, samples_per_class, **options):
  options = {"seed": 3, **options}
  return PKSampler(
    _table(sizes),
    classes_per_batch=classes_per_batch,
    samples_per_class=samples_per_class,
    **options,
  )


def _class_of(sizes, records):
  return np.repeat(np.arange(len(sizes)), sizes)[records]


# Numbers of classes below, at and above twice P, divisible by P and not.
@pytest.mark.parametrize("num_classes", [5, 6, 9, 10, 13, 40, 41, 97])
def test_every_class_is_drawn_once_per_epoch(num_classes):
  sizes = [7] * num_classes
  sampler = _sampler(sizes, 5, 2)
  num_steps = 4 * num_classes  # Twenty epochs.
  drawn = [_class_of(sizes, sampler.batch(step))[:, 0] for step in range(num_steps)]
  epochs = np.concatenate(drawn).reshape(-1, num_classes)
  np.testing.assert_array_equal(
    np.sort(epochs, axis=1), np.tile(np.arange(num_classes), (len(epochs), 1))
  )


@pytest.mark.parametrize("num_classes", [5, 6, 9, 13, 40])
def test_classes_of_a_batch_are_distinct(num_classes):
  sizes = [3] * num_classes
  sampler = _sampler(sizes, 5, 2)
  for step in range(200):
    classes = _class_of(sizes, sampler.batch(step))
    assert len(set(classes[:, 0])) == 5
    assert (classes == classes[:, :1]).all()


def test_no_member_repeats_before_all_are_drawn():
  sizes = [2, 4, 5, 7, 8, 9, 30]
  sampler = _sampler(sizes, 3, 4)
  streams = collections.defaultdict(list)
  for step in range(700):
    for row in sampler.batch(step):
      streams[int(_class_of(sizes, row[0]))].extend(row.tolist())
  for class_id, stream in streams.items():
    size = sizes[class_id]
    whole = np.array(stream[: len(stream) // size * size]).reshape(-1, size)
    assert len(whole) > 30
    assert all(len(set(cycle)) == size for cycle in whole.tolist())


def test_samples_of_a_large_enough_class_are_distinct():
  sizes = [4, 5, 6, 7, 8, 50]
  sampler = _sampler(sizes, 2, 4)
  rows = np.concatenate([sampler.batch(step) for step in range(500)])
  assert all(len(set(row)) == 4 for row in rows.tolist())


def test_small_classes_are_repeated_as_equally_often_as_possible():
  sampler = _sampler([3, 9, 9], 3, 8)
  for step in range(50):
    row = next(row for row in sampler.batch(step) if row[0] < 3)
    assert sorted(collections.Counter(row.tolist()).values()) == [2, 3, 3]


def test_small_classes_are_excluded_on_request():
  sizes = [3, 9, 9, 9]
  sampler = _sampler(sizes, 3, 4, small_classes="leave_out")
  drawn = np.concatenate([sampler.batch(step).ravel() for step in range(50)])
  assert set(_class_of(sizes, drawn)) == {1, 2, 3}


def test_small_classes_are_logged(caplog):
  with caplog.at_level("INFO", logger="absl"):
    _sampler([3, 9, 9], 2, 4)
  assert "1 of 3 classes have fewer than 4 records" in caplog.text


def test_batch_is_a_pure_function_of_seed_and_step():
  sizes = [5, 8, 11, 6, 7]
  forwards, other = _sampler(sizes, 2, 3), _sampler(sizes, 2, 3)
  batches = [forwards.batch(step) for step in range(40)]
  for step in reversed(range(40)):
    np.testing.assert_array_equal(other.batch(step), batches[step])


def test_order_depends_on_the_seed():
  sizes = [20] * 30
  one = np.stack([_sampler(sizes, 5, 2, seed=1).batch(step) for step in range(20)])
  two = np.stack([_sampler(sizes, 5, 2, seed=2).batch(step) for step in range(20)])
  assert (one != two).mean() > 0.8


def test_only_the_given_classes_are_drawn():
  sizes = [4] * 10
  sampler = _sampler(sizes, 3, 2, classes=np.array([1, 4, 7, 8], np.int32))
  drawn = np.concatenate([sampler.batch(step).ravel() for step in range(30)])
  assert set(_class_of(sizes, drawn)) == {1, 4, 7, 8}


def test_pairs_of_classes_share_batches_equally_often():
  # 12 classes, P = 4: a pair shares a batch with probability 4·3 / (12·11).
  sizes, num_steps = [2] * 12, 6000
  sampler = _sampler(sizes, 4, 2)
  meetings = np.zeros((12, 12))
  for step in range(num_steps):
    classes = _class_of(sizes, sampler.batch(step)[:, 0])
    meetings[np.ix_(classes, classes)] += 1
  pairs = meetings[np.triu_indices(12, 1)]
  expected = num_steps * 12 / 132
  # Six standard deviations of a count.
  assert np.abs(pairs - expected).max() < 6 * np.sqrt(expected)


def test_ten_million_classes_need_no_additional_memory():
  starts = np.arange(10_000_001, dtype=np.int64)
  table = MemberTable(np.arange(10_000_000), starts)
  sampler = PKSampler(table, classes_per_batch=512, samples_per_class=1, seed=0)
  assert len(np.unique(sampler.batch(123_456_789))) == 512


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: _sampler([5, 5], 3, 2), "exceeds the 2 available classes"),
    (lambda: _sampler([5, 5], 0, 2), "classes_per_batch=0"),
    (lambda: _sampler([5, 5], 2, 0), "samples_per_class=0"),
    (lambda: _sampler([5, 5], 2, 2, small_classes="drop"), "must be one of repeat"),
    (lambda: SequentialSampler(np.arange(3), records_per_batch=0), "at least 1"),
  ],
)
def test_invalid_options_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_sequential_sampler_covers_all_and_pads_the_last_batch():
  sampler = SequentialSampler(np.array([4, 8, 15, 16, 23]), records_per_batch=2)
  batches = [sampler.batch(step).tolist() for step in range(sampler.num_batches)]
  assert batches == [[4, 8], [15, 16], [23, -1]]


class _Index:
  def __init__(self, sizes, class_names=None):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    self.labels = labels
    self.member_table = members_from_labels(labels, len(sizes))
    self.num_classes = len(sizes)
    self.members = self.member_table.members
    self.class_names = class_names or [f"class {n}" for n in range(len(sizes))]


def _sampler_fn(classes_per_batch=None, **options):
  if classes_per_batch is not None:
    options["classes_per_batch"] = classes_per_batch
  return functools.partial(PKSampler, samples_per_class=3, seed=1, **options)


def _hard(index, **options):
  return HardClassSampler(
    index,
    sampler_fn=_sampler_fn(),
    hard_classes=["class 1", "class 5", "class 7"],
    num_hard=2,
    num_others=4,
    **options,
  )


def test_batch_contains_rows_of_hard_classes():
  index = _Index([4] * 20)
  sampler = _hard(index)
  assert sampler.shape == (6, 3)
  for batch in sampler.batches(np.arange(50)):
    classes = index.labels[batch]
    assert (classes == classes[:, :1]).all()
    assert len(set(classes[:, 0])) == 6
    assert [c in (1, 5, 7) for c in classes[:, 0]] == [True] * 2 + [False] * 4


def test_hard_classes_outside_the_training_classes_are_ignored():
  index = _Index([4] * 20)
  sampler = _hard(index, classes=np.array([0, 1, 2, 3, 4, 5, 6], np.int32))
  drawn = index.labels[sampler.batches(np.arange(50))]
  assert set(drawn.ravel()) == {0, 1, 2, 3, 4, 5, 6}


def test_too_few_hard_classes_are_refused():
  with pytest.raises(UserError, match="classes_per_batch=2 exceeds the 1 available"):
    _hard(_Index([4] * 20), classes=np.arange(5, dtype=np.int32))


def test_unknown_hard_class_is_named():
  options = {"sampler_fn": _sampler_fn, "num_hard": 1, "num_others": 1}
  with pytest.raises(UserError, match="hard_classes names clas 1: not a class"):
    HardClassSampler(_Index([3] * 4), hard_classes=["class 2", "clas 1"], **options)


@pytest.mark.parametrize(
  ("pattern", "message"),
  [("(a", "is not a regular expression"), ("^a/", "has no group")],
)
def test_invalid_group_pattern_is_refused(pattern, message):
  with pytest.raises(UserError, match=message):
    _grouped(_Index([3] * 4), group_pattern=pattern)


def _lone(index, num_singleton_rows):
  return SingletonSampler(
    index, sampler_fn=_sampler_fn(2), num_singleton_rows=num_singleton_rows, seed=0
  )


def test_images_alone_in_their_class_fill_separate_rows():
  index = _Index([1, 5, 1, 4, 1, 3, 1, 1, 6, 1, 1])
  sampler = _lone(index, 2)
  assert sampler.shape == (4, 3)
  sizes = np.bincount(index.labels)
  drawn = index.labels[sampler.batches(np.arange(40))]
  assert (sizes[drawn[:, :2]] > 1).all()
  assert (sizes[drawn[:, 2:]] == 1).all()
  assert all(len(set(batch[2:].ravel())) == 6 for batch in drawn)
  assert set(drawn.ravel()) == set(range(11))


def test_too_few_images_alone_in_their_class_are_refused():
  with pytest.raises(
    UserError, match=r"6 classes of one image, and there are 4.*most 1"
  ):
    _lone(_Index([1, 1, 1, 1, 5, 5]), 2)


_NAMES = [
  f"{group}/{n}" for group, num in (("a", 9), ("b", 3), ("c", 6)) for n in range(num)
]


def _grouped(index, **options):
  return GroupedSampler(index, sampler_fn=_sampler_fn(3), seed=0, **options)


def test_batch_is_of_one_group_drawn_in_proportion_to_its_size():
  index = _Index([4] * 18, _NAMES)
  groups = np.array([name[0] for name in _NAMES])
  drawn = groups[index.labels[_grouped(index).batches(np.arange(60))]]
  assert (drawn == drawn[:, :1, :1]).all()
  names, counts = np.unique(drawn[:, 0, 0], return_counts=True)
  assert dict(zip(names, counts)) == {"a": 30, "b": 10, "c": 20}


def test_classes_of_a_group_are_drawn_equally_often():
  index = _Index([4] * 18, _NAMES)
  drawn = index.labels[_grouped(index).batches(np.arange(60))][:, :, 0]
  np.testing.assert_array_equal(np.bincount(drawn.ravel()), np.full(18, 10))


@pytest.mark.parametrize("make", [_grouped, _hard, lambda index: _lone(index, 1)])
def test_steps_drawn_together_equal_steps_drawn_alone(make):
  index = _Index([4] * 18 + [1] * 3, [*_NAMES, "a/x", "a/y", "a/z"])
  if make is _hard:
    index.class_names = [f"class {n}" for n in range(21)]
  sampler = make(index)
  together = sampler.batches(np.arange(7, 30))
  for row, step in enumerate(range(7, 30)):
    np.testing.assert_array_equal(sampler.batch(step), together[row])


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["a/1", "a/2", "a/3", "b/1"], "Group 'b': classes_per_batch=3 exceeds the 1"),
    (["a/1", "a/2", "a/3", "none"], "The class 'none' has no group by"),
  ],
)
def test_groups_too_small_for_a_batch_are_refused(names, message):
  with pytest.raises(UserError, match=message):
    _grouped(_Index([4] * 4, names))
