"""What is said of a worker that is lost."""

from __future__ import annotations

import json
import signal

import pytest
import tensorflow as tf

from trainer.distribute.workers import Workers, current_workers, reporting_lost_workers
from trainer.errors import (
  PreemptedError,
  StalledError,
  TooFewExamplesError,
  UserError,
  WorkerFailedError,
)
from trainer.runtime import shutdown


def _lose(monkeypatch, *addresses):
  content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))
  text = "Collective ops is aborted by: /job:worker/replica:0/task:1 is down\nmore"
  with reporting_lost_workers():
    raise tf.errors.UnavailableError(None, None, text)


def test_a_lost_worker_is_named_in_one_line(monkeypatch):
  with pytest.raises(StalledError, match=r"lost worker 1 \(b:2\): Coll") as caught:
    _lose(monkeypatch, "a:1", "b:2")
  assert "\n" not in str(caught.value)


def test_a_process_that_is_alone_has_lost_nobody(monkeypatch):
  with pytest.raises(tf.errors.UnavailableError):
    _lose(monkeypatch, "a:1")


def _fail(error):
  def act():
    raise error

  return act


def _two_workers(index, told_by_other):
  workers = Workers()
  workers.index, workers.num_workers = index, 2
  workers.exchange = lambda own: (
    [own, told_by_other] if index == 0 else [told_by_other, own]
  )
  return workers


def test_workers_that_all_made_theirs_go_on():
  assert _two_workers(1, "null").run_on_all(lambda: 5) == 5


def test_a_mistake_is_raised_where_it_was_made_and_elsewhere():
  with pytest.raises(UserError, match=r"^worker 0: no such file$"):
    _two_workers(1, '["UserError", "no such file"]').run_on_all(lambda: 5)
  with pytest.raises(UserError, match=r"^worker 0: no such file$"):
    _two_workers(0, "null").run_on_all(_fail(UserError("no such file")))


def test_a_mistake_of_all_workers_is_nobodys_own():
  with pytest.raises(UserError, match=r"^no$"):
    _two_workers(0, '["UserError", "no"]').run_on_all(_fail(UserError("no")))


def test_a_mistake_is_of_its_kind_on_all_workers():
  told = '["TooFewExamplesError", "few"]'
  with pytest.raises(TooFewExamplesError, match=r"^worker 0: few$"):
    _two_workers(1, told).run_on_all(lambda: 5)
  with pytest.raises(TooFewExamplesError, match=r"^few$"):
    _two_workers(0, told).run_on_all(_fail(TooFewExamplesError("few")))


def test_another_error_of_the_chief_ends_the_others_in_one_line():
  with pytest.raises(ZeroDivisionError):
    _two_workers(0, "null").run_on_chief(_fail(ZeroDivisionError("by zero")))
  with pytest.raises(WorkerFailedError, match="worker 0: ZeroDivisionError: by zero"):
    _two_workers(1, '["WorkerFailedError", "ZeroDivisionError: by zero"]').run_on_chief(
      lambda: None
    )


def test_a_worker_that_is_told_to_stop_takes_the_others_along():
  with pytest.raises(PreemptedError, match="worker 0: SIGTERM: stopped"):
    _two_workers(1, '["PreemptedError", "SIGTERM: stopped"]').run_on_all(lambda: 5)
  with pytest.raises(PreemptedError, match="SIGTERM: stopped"):
    _two_workers(0, "null").run_on_all(_fail(PreemptedError("SIGTERM: stopped")))


def test_a_signal_breaks_nothing_off_and_is_told_where_all_meet(monkeypatch):
  told = shutdown.Preemption(30.0)
  monkeypatch.setattr(shutdown, "_current", told)
  told.coordinate_with(1)
  told._handle(signal.SIGTERM, None)
  with pytest.raises(PreemptedError, match="SIGTERM: stopped with nothing new"):
    _two_workers(0, "null").run_on_all(lambda: 5)
  with told.saving(lambda: "the newest"):  # The loop itself tells the others.
    assert _two_workers(0, "null").run_on_all(lambda: 5) == 5


def test_a_rehearsal_is_without_the_strategy_and_its_mistakes_are_told(mirrored):
  seen = []
  with mirrored(2).scope():
    _two_workers(1, "null").dry_run(lambda: seen.append(tf.distribute.has_strategy()))
    assert tf.distribute.has_strategy()
    with pytest.raises(UserError, match=r"^worker 0: no such file$"):
      _two_workers(1, '["UserError", "no such file"]').dry_run(lambda: None)
    with pytest.raises(WorkerFailedError, match="worker 0: MemoryError: no"):
      _two_workers(1, '["WorkerFailedError", "MemoryError: no"]').dry_run(lambda: None)
  assert seen == [False]


def test_a_worker_that_is_alone_rehearses_nothing():
  made = []
  Workers().dry_run(lambda: made.append(1))
  assert made == []


def test_the_workers_of_a_strategy_are_made_once(mirrored):
  with mirrored(2).scope():
    assert current_workers() is current_workers()
    assert current_workers().num_local_replicas == 2
