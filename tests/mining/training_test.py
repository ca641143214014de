"""Trainings with mining: killed, resumed and mined by a separate process."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from tests.faults import runs as runs_lib
from tests.faults.runs import Runs
from trainer.mining.round import RoundLog

# All checkpoints are kept, to resume from an earlier one.
_SHORT = ("NUM_STEPS = 28", "LoopOptions.num_checkpoints_kept = 10")
_MINING = (
  *_SHORT,
  "train.mining = @OfflineMining()",
  "OfflineMining.every_steps = 10",
)
_GROUPS = (
  *_MINING,
  "OfflineMining.sampler_fn = @MinedTripletSampler",
  "MinedTripletSampler.groups_per_batch = 4",
  "MinedTripletSampler.negatives_per_group = 2",
  "MinedTripletSampler.seed = 1",
  "Miner.examples = @ExampleMining()",
  "Miner.records_per_class = 20",
  "ExampleMining.window = @RankWindow()",
  "RankWindow.first = 1",
  "RankWindow.last = 8",
)
_HERE = ("OfflineMining.miner = @Miner()",)
_BESIDE = (
  "mine.miner = @Miner()",
  "mine.poll_s = 0.05",
  "mine.timeout_s = 600.0",
  "OfflineMining.max_age_steps = 8",
  "OfflineMining.max_wait_s = 600.0",
)
_HARD = (
  *_MINING,
  *_BESIDE,
  "OfflineMining.sampler_fn = @neighbouring_class_sampler",
  "neighbouring_class_sampler.sampler_fn = @PKSampler",
  "neighbouring_class_sampler.hard_fraction = 0.5",
  "neighbouring_class_sampler.neighbours_per_seed = 1",
  "Miner.num_class_neighbours = 3",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("mining"))


def _finished(running):
  status, _ = running.wait()
  assert status == 0, running.output.read_text()
  return running.output.read_text()


def _forget_checkpoints_after(model_dir, step):
  for path in (model_dir / "checkpoints").glob("ckpt-*"):
    if int(path.name.split(".")[0][len("ckpt-") :]) > step:
      path.unlink()
  assert list((model_dir / "checkpoints").glob(f"ckpt-{step}.*"))


@pytest.mark.resume
def test_run_resumed_before_a_round_ends_like_an_uninterrupted_run(runs):
  params, flags = (*_GROUPS, *_HERE), ("--num_virtual_replicas=2",)
  _finished(runs.start("whole", *params, flags=flags))
  whole, killed = runs.folder / "whole", runs.folder / "killed"
  # The state after a kill during the second round.
  shutil.copytree(whole, killed)
  _forget_checkpoints_after(killed, 8)
  (killed / "mining" / "round-00000020").rename(killed / "mining" / "staging")
  (killed / "mining" / "staging" / "manifest.json").unlink()
  (killed / "mining" / "rounds.jsonl").write_text('{"step": 10, "round": 10}\n')
  _finished(runs.start("killed", *params, flags=flags))
  assert runs_lib.differences(killed, whole) == []
  rows = runs_lib.rows(killed)
  assert [row["step"] for row in rows] == list(range(2, 30, 2))
  held = [row.get("mining/round_step") for row in rows]
  assert held == [None] * 5 + [10.0] * 5 + [20.0] * 4
  for name in ("anchors", "positives", "negatives"):
    path = pathlib.Path("mining", "round-00000020", f"{name}.npy")
    assert (killed / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.resume
@pytest.mark.thorough
def test_rounds_of_a_separate_process_are_reused_on_resume(runs):
  miner = runs.start("beside", *_HARD, mode="mine")
  model_dir = runs.folder / "beside"
  _finished(runs.start("beside", *_HARD))
  _finished(miner)
  decisions = RoundLog(str(model_dir)).decisions()
  assert list(decisions) == [10, 20]
  assert all(0 <= step - decisions[step] <= 8 for step in decisions)
  # Newer rounds exist now; the recorded decisions still apply.
  again = runs.folder / "again"
  shutil.copytree(model_dir, again)
  _forget_checkpoints_after(again, 8)
  _finished(runs.start("again", *_HARD))
  assert runs_lib.differences(again, model_dir) == []


def test_mining_in_training_and_in_a_separate_process_is_refused(runs):
  running = runs.start("both", *_GROUPS, *_HERE, *_BESIDE, mode="mine")
  assert running.wait()[0] == 2
  assert "train.mining.miner mines inside the training" in running.last_line()
