"""Class splits: disjoint, stable, with clear errors."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.dataset import HashSplit, ListSplit
from trainer.errors import UserError

_NAMES = [f"class {i}" for i in range(1000)]


def test_hash_split_is_a_partition():
  train, evaluation = HashSplit(evaluation_fraction=0.3).split(_NAMES)
  np.testing.assert_array_equal(
    np.sort(np.concatenate([train, evaluation])), np.arange(1000)
  )
  assert 0.25 < len(evaluation) / 1000 < 0.35


def test_class_keeps_its_side_when_classes_are_added_or_reordered():
  split = HashSplit(evaluation_fraction=0.3)
  before = {_NAMES[i] for i in split.split(_NAMES).evaluation}
  more = [f"new {i}" for i in range(500)] + _NAMES[::-1]
  after = {more[i] for i in split.split(more).evaluation}
  assert before == {name for name in after if not name.startswith("new")}


def test_hash_split_is_stable_across_versions():
  held_out = HashSplit(evaluation_fraction=0.5, salt=1).split(list("abcdefgh"))
  assert held_out.evaluation.tolist() == [0, 1, 4, 7]


def test_split_depends_on_the_salt():
  one = HashSplit(evaluation_fraction=0.5, salt=1).split(_NAMES)
  two = HashSplit(evaluation_fraction=0.5, salt=2).split(_NAMES)
  assert set(one.evaluation) != set(two.evaluation)


def test_list_split_holds_out_the_listed_classes():
  train, evaluation = ListSplit(evaluation_classes=["b", "d"]).split(
    ["a", "b", "c", "d"]
  )
  assert train.tolist() == [0, 2]
  assert evaluation.tolist() == [1, 3]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: HashSplit(evaluation_fraction=1.0), "between 0 and 1"),
    (
      lambda: HashSplit(evaluation_fraction=0.5).split(["a"]),
      "each needs at least one",
    ),
    (lambda: ListSplit(evaluation_classes=["cta"]).split(["cat", "dog"]), "'cat'"),
    (lambda: ListSplit(evaluation_classes=["a"]).split(["a"]), "has 0 training"),
  ],
)
def test_user_errors_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_list_may_name_the_training_classes():
  names = ["a", "b", "c", "d"]
  split = ListSplit(evaluation_classes=["b"], train_classes=["d", "a"]).split(names)
  assert split.train.tolist() == [0, 3]
  assert split.evaluation.tolist() == [1]


@pytest.mark.parametrize(
  ("train_classes", "message"),
  [
    (["a", "b"], "has 'b' in evaluation_classes and in"),
    (["az"], "names 'az', which is"),
  ],
)
def test_training_classes_must_exist_and_not_be_held_out(train_classes, message):
  with pytest.raises(UserError, match=message):
    ListSplit(evaluation_classes=["b"], train_classes=train_classes).split(["a", "b"])


@pytest.mark.parametrize("argument", ["evaluation_classes", "train_classes"])
@pytest.mark.parametrize("names", ["12", [1, 2], ["1", 2]])
def test_invalid_list_of_names_is_refused(argument, names):
  options = {"evaluation_classes": ["1"], argument: names}
  with pytest.raises(UserError, match=rf"ListSplit\.{argument}=.* must be a list of"):
    ListSplit(**options)
