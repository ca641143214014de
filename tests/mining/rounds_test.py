"""Which round holds from which step: decided once, honoured, pruned, not too old."""

from __future__ import annotations

import errno
import functools
import gc
import json
import os
import shutil
import types
import weakref

import numpy as np
import pytest

from tests.mining.corpora import example_arrays, write_round
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining import round_folder
from trainer.mining.ledger import Ledger
from trainer.mining.mined_groups import MinedGroups
from trainer.mining.miner import Mined, Miner, made_of
from trainer.mining.neighbouring_classes import with_neighbouring_classes
from trainer.mining.offline_mining import OfflineMining
from trainer.mining.rounds import Rounds
from trainer.mining.schedule_by_rounds import ScheduleByRounds


class _Constant:
  """A schedule that draws one number, so that it is known again."""

  def __init__(self, number, shape=(3, 4)):
    self._number = number
    self.shape = shape

  def batches(self, steps):
    return np.full((len(steps), *self.shape), self._number)


# Nine classes of twelve records, of which five are trained on.
_INDEX = types.SimpleNamespace(
  facts=lambda: {"the number of records": 60},
  num_records=60,
  num_classes=9,
  member_table=types.SimpleNamespace(starts=12 * np.arange(10)),
)
_DATASET = types.SimpleNamespace(index=_INDEX, train_classes=np.arange(5))


def _of_step(index, mining_round, *, classes):
  return _Constant(mining_round.step, (2, 6))


def _rounds(folder, *, miner=None, oldest_step=0, **options):
  options = {"schedule_fn": _of_step, "every_steps": 10, **options}
  return Rounds(
    OfflineMining(**options),
    _DATASET,
    _Constant(-7),
    str(folder),
    mine_fn=miner,
    oldest_step_fn=lambda: oldest_step,
  )


def _groups_of(num_groups):
  return functools.partial(
    MinedGroups, groups_per_batch=num_groups, negatives_per_group=2, seed=1
  )


def _mined(step):
  return Mined(example_arrays(seed=step), {"counts": {"anchors": 20}})


def _write(folder, *steps):
  for step in steps:
    write_round(folder, step, made_of(_DATASET), **example_arrays())


def _drawn(rounds, *steps):
  return rounds.schedule.batches(np.array(steps))[:, 0, 0].tolist()


def _harm(folder, step):
  path = folder / "mining" / f"round-{step:08d}" / "anchors.npy"
  path.write_bytes(path.read_bytes()[:-1])


def test_batches_are_plain_until_the_first_round_and_then_of_the_newest(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined)
  rounds.resume(0, 50)
  assert rounds.metrics(0) == {}
  assert [step for step in range(1, 15) if rounds.decide(step)] == [10]
  assert _drawn(rounds, 0, 9, 10, 19) == [-7, -7, 10, 10]
  assert [step for step in range(15, 25) if rounds.decide(step)] == [20]
  assert _drawn(rounds, 10, 19, 20, 21) == [10, 10, 20, 20]
  assert rounds.schedule.batch(12).shape == (3, 4)
  assert rounds.metrics(24) == {
    "mining/round_step": 20.0,
    "mining/round_age_steps": 4.0,
    "mining/round_anchors": 20.0,
    "mining/rounds_without_examples": 0.0,
  }
  assert Ledger(str(tmp_path)).decisions() == {10: 10, 20: 20}


def test_what_was_decided_after_the_checkpoint_is_honoured(tmp_path):
  rounds = _rounds(tmp_path)
  rounds.resume(0, 50)
  _write(tmp_path, 8)
  assert rounds.decide(10)
  assert not rounds.decide(20)
  _write(tmp_path, 18)
  again = _rounds(tmp_path)
  again.resume(12, 50)
  assert not again.decide(20)
  assert _drawn(again, 12, 25) == [8, 8]
  assert again.decide(30)
  assert _drawn(again, 29, 30) == [8, 18]


def test_that_there_was_no_round_is_said_and_honoured_too(tmp_path, caplog):
  rounds = _rounds(tmp_path)
  rounds.resume(0, 50)
  assert not rounds.decide(10)
  assert "Step 10: there is no mining round yet" in caplog.text
  _write(tmp_path, 8)
  again = _rounds(tmp_path)
  again.resume(10, 50)
  assert _drawn(again, 10, 19) == [-7, -7]
  assert again.decide(20)


def test_a_run_that_was_killed_before_it_mined_mines_when_it_goes_on(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined)
  rounds.resume(10, 50)
  assert _drawn(rounds, 10) == [10]


def test_a_round_that_does_not_fit_is_mined_anew_when_the_run_goes_on(tmp_path):
  def few(index, mining_round, *, classes):
    if len(mining_round.arrays["anchors"]) < 20:
      raise UserError("too few anchors")
    return _of_step(index, mining_round, classes=classes)

  def mined_few(step):
    return Mined(example_arrays(num_anchors=3), {"counts": {}})

  rounds = _rounds(tmp_path, miner=mined_few, schedule_fn=few)
  with pytest.raises(UserError, match=r"^too few anchors$"):
    rounds.decide(10)
  assert Ledger(str(tmp_path)).decisions() == {}
  again = _rounds(tmp_path, miner=_mined, schedule_fn=few)
  again.resume(10, 50)
  assert _drawn(again, 10) == [10]


def _mined_well(step):
  if step == 20:
    raise TooFewExamplesError("nothing is hard.")
  return Mined(example_arrays(num_anchors=2 if step == 10 else 20), {"counts": {}})


def test_where_too_little_is_hard_batches_stay_as_they_are(tmp_path, caplog):
  options = {"miner": _mined_well, "schedule_fn": _groups_of(3)}
  rounds = _rounds(tmp_path, **options)
  assert not rounds.decide(10)
  assert rounds.metrics(10) == {}
  assert rounds.metrics(11) == {"mining/rounds_without_examples": 1.0}
  assert not rounds.decide(20)
  assert rounds.decide(30)
  assert "Step 10: MinedGroups.groups_per_batch=3 but a round has 2" in caplog.text
  assert "Step 20: nothing is hard. Batches stay" in caplog.text
  again = _rounds(tmp_path, **options)
  again.resume(25, 50)
  assert _drawn(again, 25) == [-7]
  assert again.metrics(25) == {"mining/rounds_without_examples": 2.0}
  assert again.decide(30)
  assert again.metrics(31) == rounds.metrics(31)


@pytest.mark.parametrize("step", [10, 20])
def test_where_that_is_wanted_too_few_examples_are_an_error(tmp_path, step):
  options = {"schedule_fn": _groups_of(3), "when_too_few": "stop"}
  rounds = _rounds(tmp_path, miner=_mined_well, **options)
  with pytest.raises(TooFewExamplesError):
    rounds.decide(step)
  assert Ledger(str(tmp_path)).decisions() == {}


def test_rounds_of_a_training_whose_checkpoints_are_gone_are_set_aside(tmp_path):
  for _ in range(2):
    rounds = _rounds(tmp_path, miner=_mined)
    rounds.resume(0, 50)
    assert Ledger(str(tmp_path)).decisions() == {}
    assert round_folder.steps(str(tmp_path)) == []
    assert rounds.decide(10)
  assert (tmp_path / "mining_before" / "round-00000010" / "anchors.npy").exists()


def test_so_are_rounds_made_beside_it_of_which_none_was_taken(tmp_path):
  _write(tmp_path, 5)
  _rounds(tmp_path).resume(0, 50)
  assert round_folder.steps(str(tmp_path)) == []
  assert (tmp_path / "mining_before" / "round-00000005" / "anchors.npy").exists()


def test_where_no_step_is_left_nothing_is_mined(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined)
  rounds.resume(30, 30)
  assert round_folder.steps(str(tmp_path)) == []
  # A training that is made longer goes on as one that was as long from the start.
  rounds.resume(30, 40)
  assert round_folder.steps(str(tmp_path)) == [30]


def test_where_all_rounds_are_gone_batches_are_plain_and_stay_so(tmp_path):
  _write(tmp_path, 8)
  rounds = _rounds(tmp_path)
  rounds.decide(10)
  round_folder.remove(str(tmp_path), 8)
  assert rounds.decide(20)
  again = _rounds(tmp_path)
  again.resume(25, 50)
  assert _drawn(rounds, 25) == _drawn(again, 25) == [-7]
  assert rounds.metrics(25) == again.metrics(25) == {}


def test_of_rounds_beside_a_damaged_one_is_passed_over(tmp_path, caplog):
  _write(tmp_path, 5, 8, 14)
  _harm(tmp_path, 8)
  rounds = _rounds(tmp_path)
  assert rounds.decide(10)
  assert _drawn(rounds, 10) == [5]
  assert "round-00000008/anchors.npy is damaged" in caplog.text


def test_one_that_was_damaged_and_is_made_anew_is_taken(tmp_path):
  _write(tmp_path, 5, 8)
  _harm(tmp_path, 8)
  rounds = _rounds(tmp_path)
  assert rounds.decide(10)
  _write(tmp_path, 8)
  assert rounds.decide(20)
  assert _drawn(rounds, 10, 20) == [5, 8]


def test_a_round_beside_of_other_data_is_refused(tmp_path):
  write_round(tmp_path, 8, {"the number of records": "61"}, **example_arrays())
  with pytest.raises(UserError, match="mined of other data: the number of records"):
    _rounds(tmp_path).decide(10)


def test_a_round_that_is_held_and_gone_is_told_in_one_line(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined)
  rounds.decide(10)
  shutil.rmtree(round_folder.path_of(str(tmp_path), 10))
  with pytest.raises(
    UserError, match=r"no mining round.*rounds.jsonl has it from step"
  ):
    _rounds(tmp_path, miner=_mined).resume(14, 50)


def test_rounds_go_that_no_checkpoint_comes_back_to(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined, oldest_step=25)
  for step in (10, 20, 30):
    rounds.decide(step)
  # Step 25, to which a run may come back, has the round of step 20.
  assert round_folder.steps(str(tmp_path)) == [30, 20]
  _rounds(tmp_path, miner=_mined, oldest_step=30).decide(40)
  assert round_folder.steps(str(tmp_path)) == [40, 30]


def test_rounds_stay_while_there_is_no_checkpoint(tmp_path):
  rounds = _rounds(tmp_path, miner=_mined)
  for step in (10, 20, 30):
    rounds.decide(step)
  assert round_folder.steps(str(tmp_path)) == [30, 20, 10]


def test_a_round_that_can_not_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
  def fail(folder, ignore_errors=False):
    if not ignore_errors:
      raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), folder)

  rounds = _rounds(tmp_path, miner=_mined, oldest_step=20)
  rounds.decide(10)
  monkeypatch.setattr(shutil, "rmtree", fail)
  assert rounds.decide(20)
  assert "round of step 10 stays: Device or resource busy" in caplog.text


def test_a_round_beside_that_is_still_to_come_stays(tmp_path):
  _write(tmp_path, 5, 8, 34)
  _rounds(tmp_path, oldest_step=10).decide(10)
  assert round_folder.steps(str(tmp_path)) == [34, 8]


@pytest.mark.parametrize(
  ("written", "message"),
  [((8,), "the newest mining round is of step 8"), ((), "there is no mining round")],
)
def test_a_round_that_is_too_old_ends_the_run_in_one_line(tmp_path, written, message):
  _write(tmp_path, *written)
  rounds = _rounds(tmp_path, max_age_steps=15)
  rounds.decide(10)
  assert _drawn(rounds, 10) == [8 if written else -7]
  with pytest.raises(UserError, match=f"step 30: {message}.*max_age_steps=15 behind"):
    rounds.decide(30)


def test_a_round_kept_for_want_of_another_may_get_too_old(tmp_path):
  def mined_once(step):
    if step > 10:
      raise TooFewExamplesError("nothing is hard.")
    return _mined(step)

  rounds = _rounds(tmp_path, miner=mined_once, max_age_steps=15)
  assert rounds.decide(10)
  assert not rounds.decide(20)
  with pytest.raises(UserError, match=r"of step 10, .*max_age_steps=15 behind"):
    rounds.decide(30)


def test_a_round_that_comes_in_time_is_waited_for(tmp_path, monkeypatch):
  rounds = _rounds(tmp_path, max_age_steps=5, max_wait_s=60)
  monkeypatch.setattr("time.sleep", lambda _: _write(tmp_path, 6))
  assert rounds.decide(10)
  assert _drawn(rounds, 10) == [6]


@pytest.mark.parametrize(
  ("content", "message"),
  [("{", "JSONDecodeError"), ('{"step": 1}', "KeyError"), ("3", "TypeError")],
)
def test_a_damaged_ledger_is_told_in_one_line(tmp_path, content, message):
  (tmp_path / "mining").mkdir()
  (tmp_path / "mining" / "rounds.jsonl").write_text(content)
  with pytest.raises(UserError, match=rf"rounds.jsonl is damaged \({message}"):
    _rounds(tmp_path).resume(0, 50)


def test_the_ledger_is_plain_text(tmp_path):
  ledger = Ledger(str(tmp_path))
  ledger.add(20, 15)
  ledger.add(10, None)
  lines = (tmp_path / "mining" / "rounds.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows == [{"step": 10, "round": None}, {"step": 20, "round": 15}]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"every_steps": 0}, "every_steps=0 must be at least 1"),
    ({"max_age_steps": 0}, "max_age_steps=0 must be at least 1"),
    ({"max_wait_s": -1.0}, "max_wait_s=-1.0 is below 0"),
    ({"when_too_few": "go"}, "'go' is neither keep nor stop"),
  ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    _rounds(tmp_path, **options)


def test_rounds_between_two_looks_of_the_host_are_refused():
  with pytest.raises(UserError, match=r"every_steps=10 must be a multiple of .*=4"):
    OfflineMining(schedule_fn=_of_step, every_steps=10).check(4)


def test_batches_of_another_size_are_refused(tmp_path):
  def larger(index, mining_round, *, classes):
    return _Constant(1, (2, 7))

  rounds = _rounds(tmp_path, miner=_mined, schedule_fn=larger)
  options = OfflineMining(schedule_fn=larger, every_steps=10)
  for check in (
    lambda: rounds.decide(10),
    lambda: options.rehearse(_DATASET, (3, 4), 1),
  ):
    with pytest.raises(UserError, match=r"of 2 x 7 = 14 records, and .* of 3 x 4 = 12"):
      check()


def test_groups_that_do_not_divide_are_refused(tmp_path, mirrored):
  def three(index, mining_round, *, classes):
    return _Constant(1, (3, 4))

  with mirrored(2).scope():
    rounds = _rounds(tmp_path, miner=_mined, schedule_fn=three)
    with pytest.raises(UserError, match=r"3 groups .* do not split over 2 replicas"):
      rounds.decide(10)


@pytest.mark.parametrize(
  ("options", "num_replicas", "message"),
  [
    ({"schedule_fn": _groups_of(6)}, 4, "6 groups .* do not split over 4 replicas"),
    ({"schedule_fn": _groups_of(61)}, 1, "=61 but a round has 60 anchors"),
    (
      {
        "schedule_fn": _groups_of(16),
        "miner": Miner(examples=object(), records_per_class=3),
      },
      1,
      "=16 but a round has 15 anchors",
    ),
    (
      {
        "schedule_fn": functools.partial(
          with_neighbouring_classes,
          schedule_fn=None,
          hard_share=0.5,
          neighbours_per_seed=4,
        ),
        "miner": Miner(num_class_neighbours=3),
      },
      1,
      "neighbours_per_seed=4, and a round has 3 of each class; raise Miner",
    ),
    ({"miner": Miner(num_class_neighbours=3)}, 1, "no examples for MinedGroups; set"),
  ],
)
def test_what_rounds_can_never_have_is_refused_before_there_is_one(
  options, num_replicas, message
):
  options = OfflineMining(
    **{"schedule_fn": _groups_of(3), "every_steps": 10, **options}
  )
  with pytest.raises(UserError, match=message):
    options.rehearse(_DATASET, (6, 4), num_replicas)


@pytest.mark.parametrize("miner", [None, Miner(examples=object())])
def test_what_fits_is_not_refused(miner):
  options = OfflineMining(schedule_fn=_groups_of(6), every_steps=10, miner=miner)
  options.rehearse(_DATASET, (8, 3), 2)
  with pytest.raises(UserError, match=r"6 groups .* do not split over 4 replicas"):
    options.rehearse(_DATASET, (8, 3), 4)


def test_steps_of_several_rounds_are_drawn_together():
  schedule = ScheduleByRounds(_Constant(0))
  schedule.hold(4, _Constant(1, (6, 2)))
  drawn = schedule.batches(np.array([9, 0, 3, 4]))
  assert drawn.shape == (4, 3, 4)
  assert drawn[:, 2, 1].tolist() == [1, 0, 0, 1]


def test_the_schedule_that_holds_and_the_one_before_are_kept():
  schedule, held = ScheduleByRounds(_Constant(0)), []
  for number in (1, 2, 3):
    held.append(_Constant(number))
    schedule.hold(10 * number, held[-1])
  held = [weakref.ref(each) for each in held]
  gc.collect()
  assert [each() is None for each in held] == [True, False, False]
  assert schedule.batches(np.array([29, 30]))[:, 0, 0].tolist() == [2, 3]
  with pytest.raises(ValueError, match="from step 20 on are kept; got 19"):
    schedule.batches(np.array([30, 19]))
