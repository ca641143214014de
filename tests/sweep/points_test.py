from __future__ import annotations

import pytest

from trainer.config import run_config
from trainer.errors import UserError
from trainer.sweep import points, spec

_TWO_LOSSES = """
choice/TrainStep.loss = (@BatchAllTripletLoss(), @BatchHardTripletLoss())
BatchHardTripletLoss.margin = %MARGIN
choice/BatchAllTripletLoss.margin = (0.1, 0.2)
"""


def _points(path):
  read = spec.read_spec(path)
  return points.listed(read, points.PointBuilder(read))


def test_point_has_the_hash_of_its_run(sweep_file, tmp_path):
  point = _points(sweep_file("choice/MARGIN = (0.7,)"))[0]
  run = run_config.read(
    [sweep_file("", name="run")], ["MARGIN = 0.7"], needed=("train", "evaluate")
  )
  assert point.run_id == run.hash[:16]
  assert point.config.values == run.values


def test_text_of_a_point_is_a_run_file_of_the_same_config(sweep_file, tmp_path):
  point = _points(sweep_file(_TWO_LOSSES))[-1]
  (tmp_path / "point.gin").write_text(point.config.text)
  again = run_config.read([str(tmp_path / "point.gin")], needed=("train", "evaluate"))
  assert again.hash == point.config.hash


def test_unused_settings_are_omitted_and_equal_points_merged(sweep_file):
  found = _points(sweep_file(_TWO_LOSSES))
  losses = [point.config.values["train.step.loss"] for point in found]
  assert losses == ["@BatchAllTripletLoss()"] * 2 + ["@BatchHardTripletLoss()"]
  assert "BatchAllTripletLoss.margin" in found[0].settings
  assert found[2].settings == {"TrainStep.loss": "@BatchHardTripletLoss()"}
  assert found[2].config.values["train.step.loss.margin"] == "0.2"


def test_points_are_ordered_by_seed(sweep_file):
  found = _points(sweep_file("choice/MARGIN = (0.1, 0.2)\nsweep.seeds = (7, 8)"))
  assert [(p.settings["MARGIN"], p.seed) for p in found] == [
    ("0.1", 7),
    ("0.2", 7),
    ("0.1", 8),
    ("0.2", 8),
  ]
  assert found[0].config.values["train.seed"] == "7"


def test_constraint_excludes_points(sweep_file):
  found = _points(
    sweep_file(
      "choice/PKSampler.classes_per_batch = (2, 4)\n"
      "choice/PKSampler.samples_per_class = (8, 16)\n"
      "sweep.constraints = ('PKSampler.classes_per_batch * "
      "PKSampler.samples_per_class == 32',)"
    )
  )
  assert [list(point.settings.values()) for point in found] == [["2", "16"], ["4", "8"]]


def test_random_search_draws_distinct_points_reproducibly(sweep_file):
  text = "log_range/LEARNING_RATE = (1e-4, 1e-2)\nchoice/MARGIN = (0.1, 0.2)\n"
  text += "sweep.method = 'random'\nsweep.num_trials = 20"
  first, second = (_points(sweep_file(text)) for _ in range(2))
  assert len({point.run_id for point in first}) == 20
  assert [point.run_id for point in first] == [point.run_id for point in second]


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("choice/MARGI = (0.1, 0.2)", ["nothing uses MARGI"]),
    ("choice/PKSampler.class_per_batch = (2, 4)", ["'classes_per_batch'?"]),
    ("choice/PKSampl.classes_per_batch = (2, 4)", ["did you mean 'PKSampler'?"]),
    ("choise/MARGIN = (0.1, 0.2)", ["did you mean 'choice'?"]),
    ("choice/TrainStep.loss = (@BatchAllTripletLoss(), @BatchHard())", ["'BatchHard'"]),
    ("choice/TrainStep.loss = (@BatchHardTripletLoss(),)", ["margin must be set"]),
    ("choice/MARGIN = (0.1,)\nCircleLoss.margin = 1.0", ["nothing uses CircleLoss"]),
    ("range/MARGIN = (0.1, 0.2)", ["needs a third number", "mine.gin:3"]),
    ("choice/MARGIN = (1, 2)\nsweep.constraints = ('MARGIN > 2',)", ["grid is empty"]),
    ("range/MARGIN = (1, 90000, 20000)", ["20,000 points"]),
    ("", ["nothing is swept"]),
    ("choice/SEED = (1, 2)\nsweep.seeds = (1, 2)", ["SEED is swept and set by"]),
    ("choice/MARGIN = (0.1,)\nsweep.seed_name = 'SED'\nsweep.seeds = (1,)", ["SED"]),
    ("sweep.method = 'gird'\nchoice/MARGIN = (1,)", ["did you mean 'grid'?"]),
    ("sweep.metod = 'grid'\nchoice/MARGIN = (1,)", ["did you mean 'method'?"]),
    ("sweep.num_trials = 3\nchoice/MARGIN = (1,)", ["remove it"]),
    ("sweep.method = 'random'\nchoice/MARGIN = (1,)", ["needs sweep.num_trials"]),
    ("sweep.seeds = 3\nchoice/MARGIN = (1,)", ["must be a list"]),
    ("sweep.seeds = (3, 3)\nchoice/MARGIN = (1,)", ["has duplicates"]),
    ("sweep.prune_metric = 'train/loss'\nchoice/MARGIN = (1,)", ["'tpe'"]),
    (
      "sweep.method = 'random'\nsweep.num_trials = 9\nchoice/MARGIN = (1, 2)",
      ["only 2 different points"],
    ),
  ],
)
def test_mistake_in_a_sweep_file_is_refused(sweep_file, text, words):
  with pytest.raises(UserError) as caught:
    _points(sweep_file(text))
  assert all(word in str(caught.value) for word in words)


def test_wrong_name_in_the_last_of_a_hundred_points_is_detected(sweep_file):
  margins = ", ".join(f"{i / 1000}" for i in range(1, 97))
  with pytest.raises(UserError, match="MARGN"):
    _points(sweep_file(f"choice/MARGIN = ({margins}, %MARGN)"))
