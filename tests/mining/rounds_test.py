"""The round used from each step: decided once, kept on resume, pruned."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from tests.mining.corpora import example_arrays, write_round
from tests.mining.deciding import (
  drawn,
  groups_of,
  harm,
  make_rounds,
  mined_round,
  of_step,
  write_rounds,
)
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining import round
from trainer.mining.miner import RoundContent
from trainer.mining.round import RoundLog


def test_batches_are_plain_before_the_first_round_then_from_the_newest(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round)
  rounds.resume(0, 50)
  assert rounds.metrics(0) == {}
  assert [step for step in range(1, 15) if rounds.decide(step)] == [10]
  assert drawn(rounds, 0, 9, 10, 19) == [-7, -7, 10, 10]
  assert [step for step in range(15, 25) if rounds.decide(step)] == [20]
  assert drawn(rounds, 10, 19, 20, 21) == [10, 10, 20, 20]
  assert rounds.sampler.batch(12).shape == (3, 4)
  assert rounds.metrics(24) == {
    "mining/round_step": 20.0,
    "mining/round_age_steps": 4.0,
    "mining/round_anchors": 20.0,
    "mining/rounds_without_examples": 0.0,
  }
  assert RoundLog(str(tmp_path)).decisions() == {10: 10, 20: 20}


def test_decisions_after_the_checkpoint_are_kept(tmp_path):
  rounds = make_rounds(tmp_path)
  rounds.resume(0, 50)
  write_rounds(tmp_path, 8)
  assert rounds.decide(10)
  assert not rounds.decide(20)
  write_rounds(tmp_path, 18)
  again = make_rounds(tmp_path)
  again.resume(12, 50)
  assert not again.decide(20)
  assert drawn(again, 12, 25) == [8, 8]
  assert again.decide(30)
  assert drawn(again, 29, 30) == [8, 18]


def test_decision_without_a_round_is_logged_and_kept(tmp_path, caplog):
  rounds = make_rounds(tmp_path)
  rounds.resume(0, 50)
  assert not rounds.decide(10)
  assert "Step 10: there is no mining round yet" in caplog.text
  write_rounds(tmp_path, 8)
  again = make_rounds(tmp_path)
  again.resume(10, 50)
  assert drawn(again, 10, 19) == [-7, -7]
  assert again.decide(20)


def test_run_killed_before_mining_mines_on_resume(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round)
  rounds.resume(10, 50)
  assert drawn(rounds, 10) == [10]


def test_unsuitable_round_is_mined_again_on_resume(tmp_path):
  def few(index, mining_round, *, classes):
    if len(mining_round.arrays["anchors"]) < 20:
      raise UserError("too few anchors")
    return of_step(index, mining_round, classes=classes)

  def mined_few(step):
    return RoundContent(example_arrays(num_anchors=3), {"counts": {}})

  rounds = make_rounds(tmp_path, miner=mined_few, sampler_fn=few)
  with pytest.raises(UserError, match=r"^too few anchors$"):
    rounds.decide(10)
  assert RoundLog(str(tmp_path)).decisions() == {}
  again = make_rounds(tmp_path, miner=mined_round, sampler_fn=few)
  again.resume(10, 50)
  assert drawn(again, 10) == [10]


def _mined_well(step):
  if step == 20:
    raise TooFewExamplesError("nothing is hard.")
  return RoundContent(
    example_arrays(num_anchors=2 if step == 10 else 20), {"counts": {}}
  )


def test_batches_are_unchanged_if_too_few_examples_are_hard(tmp_path, caplog):
  options = {"miner": _mined_well, "sampler_fn": groups_of(3)}
  rounds = make_rounds(tmp_path, **options)
  assert not rounds.decide(10)
  assert rounds.metrics(10) == {}
  assert rounds.metrics(11) == {"mining/rounds_without_examples": 1.0}
  assert not rounds.decide(20)
  assert rounds.decide(30)
  assert "Step 10: MinedTripletSampler.groups_per_batch=3 exceeds the 2" in caplog.text
  assert "Step 20: nothing is hard. Sampling is" in caplog.text
  again = make_rounds(tmp_path, **options)
  again.resume(25, 50)
  assert drawn(again, 25) == [-7]
  assert again.metrics(25) == {"mining/rounds_without_examples": 2.0}
  assert again.decide(30)
  assert again.metrics(31) == rounds.metrics(31)


@pytest.mark.parametrize("step", [10, 20])
def test_too_few_examples_are_an_error_on_request(tmp_path, step):
  options = {"sampler_fn": groups_of(3), "when_too_few": "stop"}
  rounds = make_rounds(tmp_path, miner=_mined_well, **options)
  with pytest.raises(TooFewExamplesError):
    rounds.decide(step)
  assert RoundLog(str(tmp_path)).decisions() == {}


def test_rounds_without_checkpoints_are_set_aside(tmp_path):
  for _ in range(2):
    rounds = make_rounds(tmp_path, miner=mined_round)
    rounds.resume(0, 50)
    assert RoundLog(str(tmp_path)).decisions() == {}
    assert round.round_steps(str(tmp_path)) == []
    assert rounds.decide(10)
  assert (tmp_path / "mining_before" / "round-00000010" / "anchors.npy").exists()


def test_unused_rounds_of_a_separate_process_are_set_aside(tmp_path):
  write_rounds(tmp_path, 5)
  make_rounds(tmp_path).resume(0, 50)
  assert round.round_steps(str(tmp_path)) == []
  assert (tmp_path / "mining_before" / "round-00000005" / "anchors.npy").exists()


def test_finished_run_is_not_mined(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round)
  rounds.resume(30, 30)
  assert round.round_steps(str(tmp_path)) == []
  # An extended training equals one of that length from the start.
  rounds.resume(30, 40)
  assert round.round_steps(str(tmp_path)) == [30]


def test_batches_stay_plain_after_all_rounds_are_removed(tmp_path):
  write_rounds(tmp_path, 8)
  rounds = make_rounds(tmp_path)
  rounds.decide(10)
  round.remove_round(str(tmp_path), 8)
  assert rounds.decide(20)
  again = make_rounds(tmp_path)
  again.resume(25, 50)
  assert drawn(rounds, 25) == drawn(again, 25) == [-7]
  assert rounds.metrics(25) == again.metrics(25) == {}


def test_missing_round_in_use_is_reported_in_one_line(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round)
  rounds.decide(10)
  shutil.rmtree(round.round_path(str(tmp_path), 10))
  with pytest.raises(
    UserError, match=r"not a complete mining round.*rounds.jsonl uses it from step"
  ):
    make_rounds(tmp_path, miner=mined_round).resume(14, 50)


def test_rounds_needed_by_no_checkpoint_are_removed(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round, oldest_step=25)
  for step in (10, 20, 30):
    rounds.decide(step)
  # A run may resume at step 25, which uses the round of step 20.
  assert round.round_steps(str(tmp_path)) == [30, 20]
  make_rounds(tmp_path, miner=mined_round, oldest_step=30).decide(40)
  assert round.round_steps(str(tmp_path)) == [40, 30]


def test_rounds_are_kept_while_no_checkpoint_exists(tmp_path):
  rounds = make_rounds(tmp_path, miner=mined_round)
  for step in (10, 20, 30):
    rounds.decide(step)
  assert round.round_steps(str(tmp_path)) == [30, 20, 10]


def test_failed_removal_of_a_round_is_a_warning(tmp_path, monkeypatch, caplog):
  def fail(folder, ignore_errors=False):
    if not ignore_errors:
      raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), folder)

  rounds = make_rounds(tmp_path, miner=mined_round, oldest_step=20)
  rounds.decide(10)
  monkeypatch.setattr(shutil, "rmtree", fail)
  assert rounds.decide(20)
  assert "round of step 10 can't be removed: Device or resource busy" in caplog.text


@pytest.mark.parametrize(
  ("content", "message"),
  [("{", "JSONDecodeError"), ('{"step": 1}', "KeyError"), ("3", "TypeError")],
)
def test_a_damaged_round_log_is_reported_in_one_line(tmp_path, content, message):
  (tmp_path / "mining").mkdir()
  (tmp_path / "mining" / "rounds.jsonl").write_text(content)
  with pytest.raises(UserError, match=rf"rounds.jsonl is damaged \({message}"):
    make_rounds(tmp_path).resume(0, 50)


def test_the_round_log_is_plain_text(tmp_path):
  round_log = RoundLog(str(tmp_path))
  round_log.add(20, 15)
  round_log.add(10, None)
  lines = (tmp_path / "mining" / "rounds.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows == [{"step": 10, "round": None}, {"step": 20, "round": 15}]


def test_damaged_round_of_a_separate_process_is_skipped(tmp_path, caplog):
  write_rounds(tmp_path, 5, 8, 14)
  harm(tmp_path, 8)
  rounds = make_rounds(tmp_path)
  assert rounds.decide(10)
  assert drawn(rounds, 10) == [5]
  assert "round-00000008/anchors.npy is damaged" in caplog.text


def test_repaired_round_is_used(tmp_path):
  write_rounds(tmp_path, 5, 8)
  harm(tmp_path, 8)
  rounds = make_rounds(tmp_path)
  assert rounds.decide(10)
  write_rounds(tmp_path, 8)
  assert rounds.decide(20)
  assert drawn(rounds, 10, 20) == [5, 8]


def test_round_of_other_data_is_refused(tmp_path):
  write_round(tmp_path, 8, {"the number of records": "61"}, **example_arrays())
  with pytest.raises(UserError, match="mined from other data: the number of records"):
    make_rounds(tmp_path).decide(10)


def test_round_of_a_future_step_is_kept(tmp_path):
  write_rounds(tmp_path, 5, 8, 34)
  make_rounds(tmp_path, oldest_step=10).decide(10)
  assert round.round_steps(str(tmp_path)) == [34, 8]


@pytest.mark.parametrize(
  ("written", "message"),
  [((8,), "the newest mining round is of step 8"), ((), "there is no mining round")],
)
def test_too_old_round_ends_the_run_in_one_line(tmp_path, written, message):
  write_rounds(tmp_path, *written)
  rounds = make_rounds(tmp_path, max_age_steps=15)
  rounds.decide(10)
  assert drawn(rounds, 10) == [8 if written else -7]
  with pytest.raises(UserError, match=f"step 30: {message}.*max_age_steps=15 behind"):
    rounds.decide(30)


def test_round_reused_without_a_successor_can_become_too_old(tmp_path):
  def mined_once(step):
    if step > 10:
      raise TooFewExamplesError("nothing is hard.")
    return mined_round(step)

  rounds = make_rounds(tmp_path, miner=mined_once, max_age_steps=15)
  assert rounds.decide(10)
  assert not rounds.decide(20)
  with pytest.raises(UserError, match=r"of step 10, .*max_age_steps=15 behind"):
    rounds.decide(30)


def test_run_waits_for_a_round_within_the_deadline(tmp_path, monkeypatch):
  rounds = make_rounds(tmp_path, max_age_steps=5, max_wait_s=60)
  monkeypatch.setattr("time.sleep", lambda _: write_rounds(tmp_path, 6))
  assert rounds.decide(10)
  assert drawn(rounds, 10) == [6]
