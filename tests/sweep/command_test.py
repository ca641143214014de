"""Whole sweeps with a fake task, and one with the real task."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.thorough import thorough_except
from trainer.sweep import __main__, points, spec
from trainer.sweep.run_process import RunFolder

ROOT = pathlib.Path(__file__).parents[2]
_TWO = "choice/MARGIN = (0.1, 0.2)"


def _table(folder, name="mine"):
  with open(folder / "runs" / "sweeps" / name / "sweep.csv", newline="") as file:
    return list(csv.DictReader(file))


def _calls(folder, mode="train_and_evaluate"):
  """Returns the number of calls of the task per run folder."""
  found = {}
  for path in sorted((folder / "runs" / "points").glob("*/calls.txt")):
    calls = [line for line in path.read_text().splitlines() if line.startswith(mode)]
    found[path.parent.name] = len([c for c in calls if c.split()[0] == mode])
  return found


def test_table_is_sorted_by_score_and_groups_the_seeds(sweep, folder, capsys):
  text = "choice/MARGIN = (0.2, 0.4, 0.3)\nsweep.seeds = (1, 2)"
  assert sweep(text, "--num_parallel=2") == 0
  head, best, *_ = capsys.readouterr().out.splitlines()
  assert head.split() == ["MARGIN", "eval/map_at_r", "±", "seeds"]
  assert best.split() == ["1", "0.4", "0.4000", "0.0000", "(2)"]
  rows = _table(folder)
  assert [(r["rank"], r["MARGIN"], r["seed"]) for r in rows[:3]] == [
    ("1", "0.4", "1"),
    ("1", "0.4", "2"),
    ("2", "0.3", "1"),
  ]
  assert [r["eval/map_at_r"] for r in rows] == ["0.4"] * 2 + ["0.3"] * 2 + ["0.2"] * 2


def test_page_has_a_link_to_each_report_and_needs_no_network(sweep, folder):
  assert sweep(_TWO) == 0
  sweep_dir = folder / "runs" / "sweeps" / "mine"
  page = (sweep_dir / "sweep.html").read_text()
  links = re.findall('href="([^#"]*)"', page.partition("</head>")[2])
  assert len(links) == 2
  assert all((sweep_dir / link).exists() for link in links)
  assert not re.search("https?:", page)


def test_finished_points_are_not_run_again(sweep, folder):
  assert sweep(_TWO) == 0
  assert sweep(_TWO) == 0
  assert sweep("choice/MARGIN = (0.2, 0.3)", name="other") == 0
  calls = _calls(folder)
  assert len(calls) == 3
  assert set(calls.values()) == {1}
  assert {row["state"] for row in _table(folder, "other")} == {"finished"}


def test_run_with_a_removed_folder_is_repeated(sweep, folder):
  assert sweep(_TWO) == 0
  gone, kept = sorted((folder / "runs" / "points").glob("*/"))
  shutil.rmtree(gone)
  assert sweep(_TWO) == 0
  assert _calls(folder) == {gone.name: 1, kept.name: 1}
  assert {row["state"] for row in _table(folder)} == {"finished"}


def test_data_is_ingested_once_before_the_runs(sweep, folder):
  assert sweep("choice/MARGIN = (0.1, 0.2, 0.3)", "--num_parallel=3") == 0
  assert sum(_calls(folder, "ingest").values()) == 1


def test_crashed_run_is_marked_and_the_others_continue(
  sweep, folder, capsys, monkeypatch
):
  monkeypatch.setenv("CRASH_ABOVE", "0.2")
  assert sweep("choice/MARGIN = (0.3, 0.1, 0.2)") == 1
  states = {row["MARGIN"]: row for row in _table(folder)}
  assert states["0.3"]["state"] == "failed"
  assert states["0.3"]["note"] == "status 1: error: the margin is too much for me"
  assert [states[m]["state"] for m in ("0.1", "0.2")] == ["finished"] * 2
  assert "too much for me" in capsys.readouterr().out
  page = folder / "runs" / "sweeps" / "mine" / "sweep.html"
  assert "too much for me" in page.read_text()


def test_failed_run_is_retried_only_on_request(sweep, folder, monkeypatch):
  monkeypatch.setenv("CRASH_ABOVE", "0.1")
  assert sweep(_TWO) == 1
  monkeypatch.delenv("CRASH_ABOVE")
  assert sweep(_TWO) == 1
  assert sorted(_calls(folder).values()) == [1, 1]
  assert sweep(_TWO, "--retry") == 0
  assert sorted(_calls(folder).values()) == [1, 2]


@pytest.mark.parametrize("status", ["3", "4"])
def test_preempted_run_is_restarted(sweep, folder, monkeypatch, status):
  monkeypatch.setenv("EXIT_STATUS", status)
  assert sweep("choice/MARGIN = (0.1,)") == 0
  assert list(_calls(folder).values()) == [2]


@pytest.mark.parametrize("status", ["2", "5"])
def test_run_with_a_permanent_failure_is_not_restarted(
  sweep, folder, monkeypatch, status
):
  monkeypatch.setenv("EXIT_STATUS", status)
  assert sweep("choice/MARGIN = (0.1,)") == 1
  assert list(_calls(folder).values()) == [1]


def test_each_device_has_one_run_at_a_time(sweep, folder, monkeypatch):
  monkeypatch.setenv("STEP_S", "0.05")
  assert sweep("choice/MARGIN = (0.1, 0.2, 0.3, 0.4)", "--devices=5,7") == 0
  lines = [
    line.split()
    for path in (folder / "runs" / "points").glob("*/calls.txt")
    for line in path.read_text().splitlines()
  ]
  assert {line[2] for line in lines if line[0] != "ingest"} == {"5", "7"}


def _start(folder, path, *flags, **environment):
  """Starts a sweep as a separate process; its runs use the fake task."""
  program = "import sys; sys.path[0] = sys.argv.pop(1); "
  program += "from trainer.sweep import __main__ as command; "
  program += "sys.exit(command.main(sys.argv))"
  return subprocess.Popen(
    [sys.executable, "-c", program, str(ROOT), path, *flags],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": "", **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _wait_for(condition_fn, timeout_s=60):
  deadline = time.monotonic() + timeout_s
  while not condition_fn():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _num_steps(folder):
  files = (folder / "runs" / "points").glob("*/metrics.jsonl")
  return sum(len(path.read_text().splitlines()) for path in files)


@pytest.mark.parametrize(
  ("number", "status"),
  thorough_except([(signal.SIGTERM, 3)], [(signal.SIGINT, 130), (signal.SIGTERM, 3)]),
)
def test_stopped_sweep_stops_its_run_and_resumes_it(
  sweep, folder, sweep_file, number, status
):
  path = sweep_file(_TWO)
  process = _start(folder, path, STEP_S="0.5")
  _wait_for(lambda: _num_steps(folder) >= 2)
  process.send_signal(number)
  output, errors = process.communicate(timeout=30)
  assert process.returncode == status, errors
  assert errors.splitlines()[-1] == "stopped; run the same command again to resume."
  assert "half done" in output
  before = _num_steps(folder)
  time.sleep(0.7)
  assert _num_steps(folder) == before
  assert sweep(_TWO) == 0
  assert _num_steps(folder) == 10
  assert sorted(_calls(folder).values()) == [1, 2]


def test_concurrent_sweeps_share_the_points(folder, sweep_file):
  path = sweep_file("choice/MARGIN = (0.1, 0.2, 0.3, 0.4)")
  both = [_start(folder, path, STEP_S="0.1") for _ in range(2)]
  for process in both:
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
  assert list(_calls(folder).values()) == [1, 1, 1, 1]
  assert {row["state"] for row in _table(folder)} == {"finished"}


def test_sweep_waits_for_a_run_of_another_sweep_and_takes_it_over(folder, sweep_file):
  """The other sweep ends without a result; status 0 means no point is missing."""
  path = sweep_file(_TWO)
  read = spec.read_spec(path)
  point = points.listed(read, points.PointBuilder(read))[0]
  run_folder = RunFolder(str(folder / "runs" / "points"), point, "train_and_evaluate")
  with run_folder.lock() as lock:
    assert lock is not None
    process = _start(folder, path)
    _wait_for(lambda: len(_calls(folder)) == 1)
    time.sleep(1.0)
    assert process.poll() is None
  _, errors = process.communicate(timeout=150)
  assert process.returncode == 0, errors
  assert sorted(_calls(folder).values()) == [1, 1]
  assert {row["state"] for row in _table(folder)} == {"finished"}


def test_polling_a_run_never_takes_its_lock_from_a_worker(folder, sweep_file):
  read = spec.read_spec(sweep_file(_TWO))
  point = points.listed(read, points.PointBuilder(read))[0]
  run_folder = RunFolder(str(folder), point, "train")
  with run_folder.lock():
    assert run_folder.is_locked
  is_over = threading.Event()

  def poll():
    while not is_over.is_set():
      RunFolder(str(folder), point, "train").is_locked  # noqa: B018

  thread = threading.Thread(target=poll)
  thread.start()
  lost = 0
  for _ in range(500):
    with run_folder.lock() as lock:
      lost += lock is None
  is_over.set()
  thread.join()
  assert lost == 0


def test_damaged_file_of_a_run_is_reported_without_a_traceback(
  sweep, folder, monkeypatch, capsys
):
  monkeypatch.setenv("CRASH_ABOVE", "0.15")
  assert sweep(_TWO) == 1
  [path] = (folder / "runs" / "points").glob("*/failure.json")
  for content in ("", "[1]", '{"exit_status": null, "message": 1}', "["):
    path.write_text(content)
    assert sweep(_TWO) == 1
    assert "failure.json is damaged" in capsys.readouterr().out
  (folder / "runs" / "sweeps" / "mine" / "sweep.json").write_text("[")
  assert sweep(_TWO) == 2
  assert "sweep.json is damaged" in capsys.readouterr().err


@pytest.mark.thorough
def test_run_of_a_killed_sweep_finishes(folder, sweep_file):
  path = sweep_file("choice/MARGIN = (0.1,)")
  process = _start(folder, path, STEP_S="0.5")
  _wait_for(lambda: _num_steps(folder) >= 1)
  process.kill()
  process.communicate()
  again = _start(folder, path)
  again.communicate(timeout=30)
  _wait_for(lambda: _num_steps(folder) == 5)
  assert list(_calls(folder).values()) == [1]


@pytest.mark.parametrize(
  ("text", "flags", "words"),
  [
    ("choice/MARGN = (1, 2)", (), ["nothing uses MARGN"]),
    (f"{_TWO}\nsweep.metric = 'eval/map_at_k'", (), ["did you mean 'eval/map_at_r'?"]),
    (f"{_TWO}\nsweep.metric = 'train/los'", (), ["did you mean 'train/loss'?"]),
    (f"{_TWO}\nsweep.metric = 'loss'", (), ["'loss' is neither logged nor measured"]),
    (_TWO, ("--num_paralel=2",), ["num_parallel"]),
    (_TWO, ("--num_parallel=2", "--devices=0,1"), ["exclude each other"]),
    (_TWO, ("--", "--model_dir=x"), ["'--model_dir=x' is not a flag for hardware"]),
    (_TWO, ("second.gin",), ["one sweep file is needed, 2 given"]),
  ],
)
def test_user_error_is_one_line_before_anything_starts(refusal, text, flags, words):
  line = refusal(text, *flags)
  assert all(word in line for word in words)


def test_missing_sweep_file_is_refused(folder, capsys):
  assert __main__.main(["sweep", "nowhere.gin"]) == 2
  assert "nowhere.gin" in capsys.readouterr().err


def test_folder_of_another_sweep_is_refused_with_the_difference(sweep, folder, capsys):
  assert sweep(_TWO) == 0
  assert sweep("choice/MARGIN = (0.1, 0.9)") == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert "has another sweep: MARGIN: Choice(values=[0.1, 0.2]) before" in line
  assert len(_calls(folder)) == 2


def test_logged_metric_that_never_appears_stops_the_sweep_at_its_first_row(
  sweep, folder, capsys, monkeypatch
):
  monkeypatch.setenv("STEP_S", "0.3")
  name = "mining/hard_fraction"
  assert sweep(f"{_TWO}\nsweep.metric = {name!r}\nsweep.mode = 'train'") == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert f"does not log {name!r}" in line
  assert len(_calls(folder, "train")) == 1


def test_sweep_by_a_logged_metric_uses_its_last_value(sweep, folder):
  text = f"{_TWO}\nsweep.metric = 'train/loss'\nsweep.goal = 'minimize'\n"
  assert sweep(text + "sweep.mode = 'train'") == 0
  rows = _table(folder)
  assert [row["MARGIN"] for row in rows] == ["0.2", "0.1"]
  assert float(rows[0]["train/loss"]) == pytest.approx(1 / (5 * 0.2))


def test_dry_run_lists_the_points_and_runs_nothing(sweep, folder, capsys):
  assert sweep(_TWO, "--dry_run") == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "2 runs: 2 waiting"
  assert [line.split("  ")[1] for line in lines[1:]] == ["MARGIN=0.1", "MARGIN=0.2"]
  assert not (folder / "runs").exists()


def test_help_names_every_flag():
  text = __main__.help_text()
  assert all(f"--{name} " in text for name in __main__.define_flags())


def test_real_run_is_trained_and_evaluated(tmp_path, sweep_file):
  quick = "TrainStep.mining_statistics = None"  # Slow to compile.
  path = sweep_file(
    f"choice/MARGIN = (0.1,)\nDATA_DIR = '{tmp_path}/digits'\nSEED = 3\n{quick}"
  )
  folders = (f"--sweep_dir={tmp_path}/sweep", f"--runs_dir={tmp_path}/points")
  done = subprocess.run(
    [sys.executable, "-m", "trainer.sweep", path, *folders],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  [report] = (tmp_path / "points").glob("*/report.html")
  results = json.loads((report.parent / "eval" / "metrics.json").read_text())
  assert results["latest"]["step"] == 5
