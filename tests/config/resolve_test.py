"""The walk against gin itself: what it says a root receives is what gin hands out."""

from __future__ import annotations

import pytest

from tests.config import toy_parts
from trainer.config import run_config


def _load(*params):
  return run_config.load([], params, roots=toy_parts.ROOTS)


def test_scoped_twins_get_their_own_bindings():
  read = _load(
    "toy_train.loss = None",
    "toy_train.data = @train/ToyPipeline()",
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = 7",
    "train/ToyPipeline.seed = 1",
    "eval/ToyPipeline.seed = 2",
  )
  _, _, _, train_data, *_ = toy_parts.toy_train("run")
  evaluate_data, _ = toy_parts.toy_evaluate()
  assert (train_data.index, train_data.seed) == (7, 1)
  assert (evaluate_data.index, evaluate_data.seed) == (7, 2)
  assert read.values["toy_train.data.seed"] == "1"
  assert read.values["toy_evaluate.data.seed"] == "2"
  assert read.values["toy_train.data.index"] == "7"


def test_part_inside_a_scoped_part_keeps_the_scope():
  read = _load(
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = 7",
    "ToyPipeline.decoder = @toy_decoder()",
    "toy_decoder.height = 3",
    "eval/toy_decoder.height = 4",
  )
  data, _ = toy_parts.toy_evaluate()
  assert data.decoder == 4
  assert read.values["toy_evaluate.data.decoder.height"] == "4"


def test_macro_evaluates_its_value_in_a_scope_of_its_name():
  read = _load(
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = %INDEX",
    "INDEX = @toy_decoder()",
    "toy_decoder.height = 3",
    "INDEX/toy_decoder.height = 5",
  )
  data, _ = toy_parts.toy_evaluate()
  assert data.index == 5
  assert read.values["toy_evaluate.data.index.height"] == "5"


@pytest.mark.parametrize("container", ["[{}]", "({},)", "{{'a': {}}}"])
def test_references_inside_containers_are_followed(container):
  value = container.format("@OtherToyLoss()")
  read = _load(
    "toy_train.loss = None", f"toy_train.actions = {value}", "OtherToyLoss.scale = 2"
  )
  *_, actions = toy_parts.toy_train("run")
  (action,) = actions.values() if isinstance(actions, dict) else actions
  assert action.scale == 2
  assert "2" in read.values.values()


def test_tuple_and_list_and_single_element_are_told_apart():
  texts = ["(1,)", "[1]", "1", "(1, 2)", "{}", "()"]
  values = [
    _load("toy_train.loss = None", f"toy_train.actions = {text}").hash for text in texts
  ]
  assert len(set(values)) == len(texts)
