from __future__ import annotations

import pytest

from tests.config import toy_parts
from trainer import config, errors
from trainer.config import saved

PARAMS = ["toy_train.loss = @ToyLoss()", "ToyLoss.margin = 0.5"]


def _load(*params):
  return config.load([], [*PARAMS, *params], roots=toy_parts.ROOTS)


def test_saved_config_is_a_gin_file_of_the_same_config(tmp_path):
  written = _load("toy_train.actions = ['a = b', '# c']")
  saved.save(written, str(tmp_path / "model"))
  path = str(tmp_path / "model" / saved.CONFIG)
  assert config.read([path], roots=toy_parts.ROOTS).hash == written.hash
  saved.check_same(written, str(tmp_path / "model"))


def test_operative_config_has_the_defaults_that_were_used(tmp_path):
  _load()
  toy_parts.toy_train("run")
  saved.save_operative(str(tmp_path))
  text = (tmp_path / saved.OPERATIVE_CONFIG).read_text()
  assert "ToyLoss.squared = False" in text
  assert "toy_train.steps = 10" in text


def test_folder_without_config_takes_any(tmp_path):
  saved.check_same(_load(), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_folder_with_another_config_is_refused_with_what_differs(tmp_path):
  saved.save(_load(), str(tmp_path))
  with pytest.raises(errors.UserError) as refusal:
    saved.check_same(_load("ToyLoss.margin = 0.6"), str(tmp_path))
  message = str(refusal.value)
  assert "toy_train.loss.margin: 0.5 before, 0.6 now" in message
  assert "--allow_config_change" in message


def test_long_difference_is_cut(tmp_path):
  saved.save(_load(), str(tmp_path))
  many = _load(
    f"toy_train.actions = [{'@OtherToyLoss(), ' * 9}]", "OtherToyLoss.scale=2"
  )
  with pytest.raises(errors.UserError, match="and 5 more"):
    saved.check_same(many, str(tmp_path))


def test_another_config_goes_on_where_that_is_allowed(tmp_path):
  saved.save(_load(), str(tmp_path))
  changed = _load("ToyLoss.margin = 0.6")
  saved.check_same(changed, str(tmp_path), allow_change=True)
  saved.save(changed, str(tmp_path))
  saved.check_same(changed, str(tmp_path))
  assert "ToyLoss.margin = 0.6" in (tmp_path / saved.CONFIG).read_text()
