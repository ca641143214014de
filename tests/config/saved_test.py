from __future__ import annotations

import logging
import types

import pytest

from tests.config import toy_parts
from trainer import errors
from trainer.config import run_config

PARAMS = ["toy_train.loss = @ToyLoss()", "ToyLoss.margin = 0.5"]


def _load(*params):
  return run_config.load([], [*PARAMS, *params], roots=toy_parts.ROOTS)


def test_saved_config_is_a_gin_file_of_the_same_config(tmp_path):
  written = _load("toy_train.actions = ['a = b', '# c']")
  run_config.save_config(written, str(tmp_path / "model"))
  path = str(tmp_path / "model" / run_config.CONFIG_FILE)
  assert run_config.read([path], roots=toy_parts.ROOTS).hash == written.hash
  run_config.check_same_config(written, str(tmp_path / "model"))


def test_operative_config_has_the_defaults_that_were_used(tmp_path):
  _load()
  toy_parts.toy_train("run")
  run_config.save_operative_config(str(tmp_path))
  text = (tmp_path / run_config.OPERATIVE_CONFIG_FILE).read_text()
  assert "ToyLoss.squared = False" in text
  assert "toy_train.steps = 10" in text


def test_folder_without_config_takes_any(tmp_path):
  run_config.check_same_config(_load(), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_folder_with_another_config_is_refused_with_what_differs(tmp_path):
  run_config.save_config(_load(), str(tmp_path))
  with pytest.raises(errors.UserError) as refusal:
    run_config.check_same_config(_load("ToyLoss.margin = 0.6"), str(tmp_path))
  message = str(refusal.value)
  assert "toy_train.loss.margin: 0.5 before, 0.6 now" in message
  assert "--allow_config_change" in message


def test_long_difference_is_cut(tmp_path):
  run_config.save_config(_load(), str(tmp_path))
  many = _load(
    f"toy_train.actions = [{'@OtherToyLoss(), ' * 9}]", "OtherToyLoss.scale=2"
  )
  with pytest.raises(errors.UserError, match="and 5 more"):
    run_config.check_same_config(many, str(tmp_path))


def test_another_config_goes_on_where_that_is_allowed_and_is_logged(tmp_path, caplog):
  run_config.save_config(_load(), str(tmp_path))
  changed = _load("ToyLoss.margin = 0.6")
  with caplog.at_level(logging.INFO):
    run_config.check_same_config(changed, str(tmp_path), allow_change=True)
  assert "toy_train.loss.margin: 0.5 before, 0.6 now" in caplog.text
  run_config.save_config(changed, str(tmp_path))
  run_config.check_same_config(changed, str(tmp_path))
  assert "ToyLoss.margin = 0.6" in (tmp_path / run_config.CONFIG_FILE).read_text()


def _config(**values):
  """A config with these values, the path's dots written as two underscores."""
  paths = {path.replace("__", "."): value for path, value in values.items()}
  return types.SimpleNamespace(training_values=paths, hash="", text="")


def test_a_first_value_that_a_checkpoint_has_replaced_cannot_change(tmp_path):
  folder = str(tmp_path)
  run_config.save_config(_config(train__step__loss__temperature__initial="0.1"), folder)
  changed = _config(train__step__loss__temperature__initial="0.2")
  with pytest.raises(errors.UserError, match="only used at the first step"):
    run_config.check_same_config(changed, folder, allow_change=True, is_resumed=True)
  run_config.check_same_config(changed, folder, allow_change=True, is_resumed=False)


def test_initial_weights_that_a_checkpoint_has_replaced_are_logged(tmp_path, caplog):
  folder = str(tmp_path)
  run_config.save_config(_config(train__seed="1", train__loss="a"), folder)
  with caplog.at_level(logging.INFO):
    run_config.check_same_config(
      _config(train__seed="2", train__loss="b"),
      folder,
      allow_change=True,
      is_resumed=True,
    )
  assert "train.seed: 1 before, 2 now; the weights are those of the" in caplog.text
