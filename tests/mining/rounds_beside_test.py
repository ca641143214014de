"""Rounds that another process makes: the newest whole one, not too old."""

from __future__ import annotations

import pytest

from tests.mining.corpora import example_arrays, write_round
from tests.mining.deciding import drawn, harm, make_rounds, mined_round, write_rounds
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining import round


def test_of_rounds_beside_a_damaged_one_is_passed_over(tmp_path, caplog):
  write_rounds(tmp_path, 5, 8, 14)
  harm(tmp_path, 8)
  rounds = make_rounds(tmp_path)
  assert rounds.decide(10)
  assert drawn(rounds, 10) == [5]
  assert "round-00000008/anchors.npy is damaged" in caplog.text


def test_one_that_was_damaged_and_is_made_anew_is_taken(tmp_path):
  write_rounds(tmp_path, 5, 8)
  harm(tmp_path, 8)
  rounds = make_rounds(tmp_path)
  assert rounds.decide(10)
  write_rounds(tmp_path, 8)
  assert rounds.decide(20)
  assert drawn(rounds, 10, 20) == [5, 8]


def test_a_round_beside_of_other_data_is_refused(tmp_path):
  write_round(tmp_path, 8, {"the number of records": "61"}, **example_arrays())
  with pytest.raises(UserError, match="mined of other data: the number of records"):
    make_rounds(tmp_path).decide(10)


def test_a_round_beside_that_is_still_to_come_stays(tmp_path):
  write_rounds(tmp_path, 5, 8, 34)
  make_rounds(tmp_path, oldest_step=10).decide(10)
  assert round.round_steps(str(tmp_path)) == [34, 8]


@pytest.mark.parametrize(
  ("written", "message"),
  [((8,), "the newest mining round is of step 8"), ((), "there is no mining round")],
)
def test_a_round_that_is_too_old_ends_the_run_in_one_line(tmp_path, written, message):
  write_rounds(tmp_path, *written)
  rounds = make_rounds(tmp_path, max_age_steps=15)
  rounds.decide(10)
  assert drawn(rounds, 10) == [8 if written else -7]
  with pytest.raises(UserError, match=f"step 30: {message}.*max_age_steps=15 behind"):
    rounds.decide(30)


def test_a_round_kept_for_want_of_another_may_get_too_old(tmp_path):
  def mined_once(step):
    if step > 10:
      raise TooFewExamplesError("nothing is hard.")
    return mined_round(step)

  rounds = make_rounds(tmp_path, miner=mined_once, max_age_steps=15)
  assert rounds.decide(10)
  assert not rounds.decide(20)
  with pytest.raises(UserError, match=r"of step 10, .*max_age_steps=15 behind"):
    rounds.decide(30)


def test_a_round_that_comes_in_time_is_waited_for(tmp_path, monkeypatch):
  rounds = make_rounds(tmp_path, max_age_steps=5, max_wait_s=60)
  monkeypatch.setattr("time.sleep", lambda _: write_rounds(tmp_path, 6))
  assert rounds.decide(10)
  assert drawn(rounds, 10) == [6]
