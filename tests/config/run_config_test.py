from __future__ import annotations

import types

import gin
import pytest

from tests.config import toy_parts
from trainer import errors
from trainer.config import run_config

RUN = """
# What must be set: nothing.
include "loss.gin"
MARGIN = 0.5
toy_train:
  loss = @ToyLoss()
  steps = 20
"""
LOSS = "ToyLoss.margin = %MARGIN  # units of distance\n"


@pytest.fixture
def run_file(tmp_path):
  (tmp_path / "loss.gin").write_text(LOSS)
  path = tmp_path / "run.gin"
  path.write_text(RUN)
  return path


def _read(*params, files=()):
  return run_config.read([str(f) for f in files], params, roots=toy_parts.ROOTS)


def test_values_are_those_the_roots_receive(run_file):
  assert _read(files=[run_file]).values == {
    "toy_train.loss": "@ToyLoss()",
    "toy_train.loss.margin": "0.5",
    "toy_train.steps": "20",
  }


def test_gin_receives_what_was_read(run_file):
  run_config.load([str(run_file)], ["toy_train.steps = 30"], roots=toy_parts.ROOTS)
  _, loss, steps, *_ = toy_parts.toy_train("run")
  assert (loss.margin, steps) == (0.5, 30)


def test_loading_replaces_what_gin_held(run_file):
  gin.bind_parameter("OtherToyLoss.scale", 3.0)
  run_config.load([str(run_file)], roots=toy_parts.ROOTS)
  assert toy_parts.ToyLoss is not None
  assert "OtherToyLoss" not in gin.config_str()


def test_reading_does_not_change_gin(run_file):
  _read(files=[run_file])
  assert gin.config_str().strip() == ""


def test_order_comments_and_macros_do_not_change_the_hash(run_file):
  literal = _read(
    "toy_train.steps = 20",
    "ToyLoss.margin = 0.5",
    "LOSS = @toy.ToyLoss()",
    "toy_train.loss = %LOSS",
  )
  assert literal.hash == _read(files=[run_file]).hash


@pytest.mark.parametrize(
  "param", ["MARGIN = 0.6", "toy_train.steps = 20.0", "ToyLoss.squared = True"]
)
def test_different_value_changes_the_hash(run_file, param):
  assert _read(param, files=[run_file]).hash != _read(files=[run_file]).hash


def test_text_is_a_gin_file_that_gives_the_same_config(run_file, tmp_path):
  params = ["toy_train.actions = [@toy_decoder, {'a': (1, -2.5e-3, None, 'b c')}]"]
  written = _read(*params, files=[run_file])
  (tmp_path / "written.gin").write_text(written.text)
  assert _read(files=[tmp_path / "written.gin"]).hash == written.hash


def test_each_line_of_the_text_names_its_origin(run_file):
  text = _read("toy_train.steps = 30", files=[run_file]).text
  assert f"toy_train.loss = @ToyLoss()  # {run_file}:6\n" in text
  assert f"ToyLoss.margin = %MARGIN  # {run_file.parent}/loss.gin:1\n" in text
  assert "toy_train.steps = 30  # --gin_param='toy_train.steps = 30'\n" in text
  assert "steps = 20" not in text


def test_binds_returns_whether_a_root_is_configured(run_file):
  read = _read(files=[run_file])
  assert read.binds("toy_train")
  assert not read.binds("toy_evaluate")


def test_diff_lists_old_and_new_values(run_file):
  before = _read(files=[run_file])
  now = _read("MARGIN = 0.6", "toy_train.data = None", files=[run_file])
  assert run_config.diff(before.values, now.values) == [
    "toy_train.data: unset before, None now",
    "toy_train.loss.margin: 0.5 before, 0.6 now",
  ]
  assert run_config.diff(now.values, now.values) == []


def test_required_root_must_have_all_required_parameters(run_file):
  with pytest.raises(errors.UserError, match=r"toy_evaluate\.data must be set"):
    run_config.read([str(run_file)], roots=toy_parts.ROOTS, needed=["toy_evaluate"])


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


def test_folder_without_config_accepts_any(tmp_path):
  run_config.check_same_config(_load(), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_folder_with_another_config_is_refused_with_the_difference(tmp_path):
  run_config.save_config(_load(), str(tmp_path))
  with pytest.raises(errors.UserError) as refusal:
    run_config.check_same_config(_load("ToyLoss.margin = 0.6"), str(tmp_path))
  message = str(refusal.value)
  assert "toy_train.loss.margin: 0.5 before, 0.6 now" in message
  assert "--allow_config_change" in message


def test_long_difference_is_truncated(tmp_path):
  run_config.save_config(_load(), str(tmp_path))
  many = _load(
    f"toy_train.actions = [{'@OtherToyLoss(), ' * 9}]", "OtherToyLoss.scale=2"
  )
  with pytest.raises(errors.UserError, match="and 5 more"):
    run_config.check_same_config(many, str(tmp_path))


def test_allowed_config_change_is_logged(tmp_path, caplog):
  run_config.save_config(_load(), str(tmp_path))
  changed = _load("ToyLoss.margin = 0.6")
  with caplog.at_level("INFO", logger="absl"):
    run_config.check_same_config(changed, str(tmp_path), allow_change=True)
  assert "toy_train.loss.margin: 0.5 before, 0.6 now" in caplog.text
  run_config.save_config(changed, str(tmp_path))
  run_config.check_same_config(changed, str(tmp_path))
  assert "ToyLoss.margin = 0.6" in (tmp_path / run_config.CONFIG_FILE).read_text()


def _config(**values):
  """Returns a config with these values; two underscores stand for a dot."""
  paths = {path.replace("__", "."): value for path, value in values.items()}
  return types.SimpleNamespace(training_values=paths, hash="", text="")


def test_initial_value_replaced_by_a_checkpoint_cannot_change(tmp_path):
  folder = str(tmp_path)
  run_config.save_config(_config(train__step__loss__temperature__initial="0.1"), folder)
  changed = _config(train__step__loss__temperature__initial="0.2")
  with pytest.raises(errors.UserError, match="only used before the first step"):
    run_config.check_same_config(changed, folder, allow_change=True, is_resumed=True)
  run_config.check_same_config(changed, folder, allow_change=True, is_resumed=False)


def test_initial_weights_that_a_checkpoint_has_replaced_are_logged(tmp_path, caplog):
  folder = str(tmp_path)
  run_config.save_config(_config(train__seed="1", train__loss="a"), folder)
  with caplog.at_level("INFO", logger="absl"):
    run_config.check_same_config(
      _config(train__seed="2", train__loss="b"),
      folder,
      allow_change=True,
      is_resumed=True,
    )
  assert "train.seed: 1 before, 2 now; the weights are those of the" in caplog.text
