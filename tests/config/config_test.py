from __future__ import annotations

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


def test_reading_leaves_gin_as_it_is(run_file):
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
def test_another_value_changes_the_hash(run_file, param):
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


def test_binds_tells_whether_a_root_is_configured(run_file):
  read = _read(files=[run_file])
  assert read.binds("toy_train")
  assert not read.binds("toy_evaluate")


def test_diff_tells_each_value_before_and_now(run_file):
  before = _read(files=[run_file])
  now = _read("MARGIN = 0.6", "toy_train.data = None", files=[run_file])
  assert run_config.diff(before.values, now.values) == [
    "toy_train.data: unset before, None now",
    "toy_train.loss.margin: 0.5 before, 0.6 now",
  ]
  assert run_config.diff(now.values, now.values) == []


def test_a_needed_root_must_have_all_it_requires(run_file):
  with pytest.raises(errors.UserError, match=r"toy_evaluate\.data must be set"):
    run_config.read([str(run_file)], roots=toy_parts.ROOTS, needed=["toy_evaluate"])
