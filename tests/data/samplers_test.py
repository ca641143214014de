"""The sampler's promises, checked by counting what it draws."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from trainer.data.index_arrays import MemberTable, members_from_labels
from trainer.data.samplers import PKSampler, SequentialSampler
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


# Numbers of classes below, at and above twice P, dividing by P and not.
@pytest.mark.parametrize("num_classes", [5, 6, 9, 10, 13, 40, 41, 97])
def test_every_class_comes_once_in_an_epoch(num_classes):
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


def test_no_member_comes_again_before_all_have_come():
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


def test_samples_of_a_class_are_distinct_where_it_has_enough():
  sizes = [4, 5, 6, 7, 8, 50]
  sampler = _sampler(sizes, 2, 4)
  rows = np.concatenate([sampler.batch(step) for step in range(500)])
  assert all(len(set(row)) == 4 for row in rows.tolist())


def test_small_classes_are_repeated_as_equally_often_as_possible():
  sampler = _sampler([3, 9, 9], 3, 8)
  for step in range(50):
    row = next(row for row in sampler.batch(step) if row[0] < 3)
    assert sorted(collections.Counter(row.tolist()).values()) == [2, 3, 3]


def test_small_classes_are_left_out_if_wanted():
  sizes = [3, 9, 9, 9]
  sampler = _sampler(sizes, 3, 4, small_classes="leave_out")
  drawn = np.concatenate([sampler.batch(step).ravel() for step in range(50)])
  assert set(_class_of(sizes, drawn)) == {1, 2, 3}


def test_small_classes_are_said_in_the_log(caplog):
  with caplog.at_level("INFO", logger="absl"):
    _sampler([3, 9, 9], 2, 4)
  assert "1 of 3 classes have fewer than 4 records" in caplog.text


def test_batch_is_a_pure_function_of_seed_and_step():
  sizes = [5, 8, 11, 6, 7]
  forwards, other = _sampler(sizes, 2, 3), _sampler(sizes, 2, 3)
  batches = [forwards.batch(step) for step in range(40)]
  for step in reversed(range(40)):
    np.testing.assert_array_equal(other.batch(step), batches[step])


def test_another_seed_is_another_order():
  sizes = [20] * 30
  one = np.stack([_sampler(sizes, 5, 2, seed=1).batch(step) for step in range(20)])
  two = np.stack([_sampler(sizes, 5, 2, seed=2).batch(step) for step in range(20)])
  assert (one != two).mean() > 0.8


def test_only_the_given_classes_are_drawn():
  sizes = [4] * 10
  sampler = _sampler(sizes, 3, 2, classes=np.array([1, 4, 7, 8], np.int32))
  drawn = np.concatenate([sampler.batch(step).ravel() for step in range(30)])
  assert set(_class_of(sizes, drawn)) == {1, 4, 7, 8}


def test_pairs_of_classes_meet_equally_often():
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


def test_ten_million_classes_need_no_memory_of_their_own():
  starts = np.arange(10_000_001, dtype=np.int64)
  table = MemberTable(np.arange(10_000_000), starts)
  sampler = PKSampler(table, classes_per_batch=512, samples_per_class=1, seed=0)
  assert len(np.unique(sampler.batch(123_456_789))) == 512


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: _sampler([5, 5], 3, 2), "only 2 classes can be drawn"),
    (lambda: _sampler([5, 5], 0, 2), "classes_per_batch=0"),
    (lambda: _sampler([5, 5], 2, 0), "samples_per_class=0"),
    (lambda: _sampler([5, 5], 2, 2, small_classes="drop"), "choose 'repeat' or"),
    (lambda: SequentialSampler(np.arange(3), records_per_batch=0), "at least 1"),
  ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_sequential_sampler_goes_through_all_and_pads_the_last_batch():
  sampler = SequentialSampler(np.array([4, 8, 15, 16, 23]), records_per_batch=2)
  batches = [sampler.batch(step).tolist() for step in range(sampler.num_batches)]
  assert batches == [[4, 8], [15, 16], [23, -1]]
