"""Samplers made of others: every batch has the rows that it should."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from trainer.data.index_arrays import members_from_labels
from trainer.data.samplers import (
  GroupedSampler,
  PKSampler,
  with_hard_classes,
  with_lone_images,
)
from trainer.errors import UserError


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
  return with_hard_classes(
    index,
    sampler_fn=_sampler_fn(),
    hard_classes=["class 1", "class 5", "class 7"],
    num_hard=2,
    num_others=4,
    **options,
  )


def test_some_rows_are_of_hard_classes():
  index = _Index([4] * 20)
  sampler = _hard(index)
  assert sampler.shape == (6, 3)
  for batch in sampler.batches(np.arange(50)):
    classes = index.labels[batch]
    assert (classes == classes[:, :1]).all()
    assert len(set(classes[:, 0])) == 6
    assert [c in (1, 5, 7) for c in classes[:, 0]] == [True] * 2 + [False] * 4


def test_hard_classes_of_the_other_side_are_passed_over():
  index = _Index([4] * 20)
  sampler = _hard(index, classes=np.array([0, 1, 2, 3, 4, 5, 6], np.int32))
  drawn = index.labels[sampler.batches(np.arange(50))]
  assert set(drawn.ravel()) == {0, 1, 2, 3, 4, 5, 6}


def test_too_few_hard_classes_are_refused():
  with pytest.raises(UserError, match="classes_per_batch=2 but only 1 classes"):
    _hard(_Index([4] * 20), classes=np.arange(5, dtype=np.int32))


def test_a_hard_class_that_the_data_have_not_is_named():
  options = {"sampler_fn": _sampler_fn, "num_hard": 1, "num_others": 1}
  with pytest.raises(
    UserError, match="hard_classes names clas 1, and the data have no"
  ):
    with_hard_classes(_Index([3] * 4), hard_classes=["class 2", "clas 1"], **options)


@pytest.mark.parametrize(
  ("pattern", "message"), [("(a", "is no regular expression"), ("^a/", "has no group")]
)
def test_a_group_pattern_that_is_none_is_refused(pattern, message):
  with pytest.raises(UserError, match=message):
    _grouped(_Index([3] * 4), group_pattern=pattern)


def _lone(index, num_lone_rows):
  return with_lone_images(
    index, sampler_fn=_sampler_fn(2), num_lone_rows=num_lone_rows, seed=0
  )


def test_lone_images_fill_rows_of_their_own():
  index = _Index([1, 5, 1, 4, 1, 3, 1, 1, 6, 1, 1])
  sampler = _lone(index, 2)
  assert sampler.shape == (4, 3)
  sizes = np.bincount(index.labels)
  drawn = index.labels[sampler.batches(np.arange(40))]
  assert (sizes[drawn[:, :2]] > 1).all()
  assert (sizes[drawn[:, 2:]] == 1).all()
  assert all(len(set(batch[2:].ravel())) == 6 for batch in drawn)
  assert set(drawn.ravel()) == set(range(11))


def test_too_few_lone_images_are_refused():
  with pytest.raises(
    UserError, match=r"6 classes of one image, and there are 4.*most 1"
  ):
    _lone(_Index([1, 1, 1, 1, 5, 5]), 2)


_NAMES = [
  f"{group}/{n}" for group, num in (("a", 9), ("b", 3), ("c", 6)) for n in range(num)
]


def _grouped(index, **options):
  return GroupedSampler(index, sampler_fn=_sampler_fn(3), seed=0, **options)


def test_a_batch_is_of_one_group_and_groups_come_by_their_size():
  index = _Index([4] * 18, _NAMES)
  groups = np.array([name[0] for name in _NAMES])
  drawn = groups[index.labels[_grouped(index).batches(np.arange(60))]]
  assert (drawn == drawn[:, :1, :1]).all()
  names, counts = np.unique(drawn[:, 0, 0], return_counts=True)
  assert dict(zip(names, counts)) == {"a": 30, "b": 10, "c": 20}


def test_every_class_of_a_group_comes_equally_often():
  index = _Index([4] * 18, _NAMES)
  drawn = index.labels[_grouped(index).batches(np.arange(60))][:, :, 0]
  np.testing.assert_array_equal(np.bincount(drawn.ravel()), np.full(18, 10))


@pytest.mark.parametrize("make", [_grouped, _hard, lambda index: _lone(index, 1)])
def test_steps_drawn_together_are_those_drawn_alone(make):
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
    (["a/1", "a/2", "a/3", "b/1"], "Group 'b': classes_per_batch=3 but only 1"),
    (["a/1", "a/2", "a/3", "none"], "The class 'none' has no group by"),
  ],
)
def test_groups_that_make_no_batch_are_refused(names, message):
  with pytest.raises(UserError, match=message):
    _grouped(_Index([4] * 4, names))
