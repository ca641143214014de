"""Every file that a run writes, on a full disk.

`CONTINUES` lists files written during training: the run continues, warns, and writes
the file once there is space. `REFUSES` lists the results of a mode: the mode fails in
one line and leaves existing files unchanged.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pathlib
import resource
import subprocess

import gin
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from tests.mining.corpora import example_arrays, write_round
from tests.mining.deciding import make_rounds, mined_round
from tests.report import example_run
from trainer import errors
from trainer.config import run_config
from trainer.mining.round import RoundLog
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.report import page
from trainer.retrieval import faiss_index, report_collector
from trainer.retrieval import results as results_lib
from trainer.retrieval.embedding_store import EmbeddingWriter
from trainer.retrieval.results import Measurement, Results
from trainer.runtime.lease import locked_folder
from trainer.serving import saved_model
from trainer.sweep import sweep_results
from trainer.sweep.spec import SweepOptions
from trainer.training import callbacks
from trainer.training.callbacks import (
  HISTORY_FILE,
  MetricsFile,
  SaveOperativeConfig,
  StepReport,
  WriteEvents,
  WriteMetrics,
  WriteOnce,
)
from trainer.training.checkpoint import Checkpoints

_REPORTS = [StepReport(step, 3, {"train/loss": 1.0 / step}) for step in (1, 2, 3)]


class _MountedDisk:
  """A mounted file system of 400 kB, filled to the last byte."""

  def __init__(self, folder):
    self.folder = folder
    self._filler = os.path.join(folder, "filler")

  @contextlib.contextmanager
  def full(self):
    with open(self._filler, "wb", buffering=0) as file:
      for size in (4096, 1):
        with contextlib.suppress(OSError):
          while True:
            file.write(bytes(size))
    try:
      yield
    finally:
      os.unlink(self._filler)


class _LimitedDisk:
  """A folder in which the file size limit of this process stops all writes."""

  def __init__(self, folder):
    self.folder = folder

  @contextlib.contextmanager
  def full(self):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["mounted", "limited"])
def disk(request, tmp_path):
  if request.param == "limited":
    yield _LimitedDisk(str(tmp_path))
    return
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
  if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("no disk can be mounted here; the limit on files stands for it")
  try:
    yield _MountedDisk(str(folder))
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _metrics(folder):
  write = WriteMetrics(MetricsFile(folder))
  return write, lambda: [row["step"] for row in MetricsFile(folder).rows()], [1, 2, 3]


def _evaluations(folder):
  write = WriteMetrics(MetricsFile(folder, HISTORY_FILE))

  def steps():
    return [row["step"] for row in MetricsFile(folder, HISTORY_FILE).rows()]

  return write, steps, [1, 2, 3]


def _events(folder):
  def steps():
    paths = sorted(pathlib.Path(folder).glob("events.*"))
    return {step for path in paths for step in _steps_of_events(path)}

  return WriteEvents(folder), steps, {1, 2, 3}


def _steps_of_events(path):
  """Returns the readable steps of an event file."""
  try:
    for record in tf.data.TFRecordDataset(str(path)):
      event = tf.compat.v1.Event.FromString(record.numpy())
      yield from (event.step for _ in event.summary.value)
  except tf.errors.DataLossError:
    return


@gin.configurable
def _called_by_the_test(size=1):
  return size


def _operative_config(folder):
  path = os.path.join(folder, run_config.OPERATIVE_CONFIG_FILE)

  _called_by_the_test()
  return SaveOperativeConfig(folder), lambda: "_called_by_the_test" in _text(path), True


def _before_training(folder):
  results = Results(folder)
  measured = Measurement({"eval/recall_at_1": 0.5})
  write = WriteOnce(results.path, lambda: results.write_before_training(measured))
  return write, lambda: list(Results(folder).by_moment), ["before_training"]


def _log(folder):
  callbacks.keep_log(folder)
  handler = logging.get_absl_logger().handlers[-1]

  def write(report):
    logging.warning("Step %d of this test.", report.step)

  def last_step_is_there():
    logging.get_absl_logger().removeHandler(handler)
    handler.close()
    return "Step 3 of this test." in _text(os.path.join(folder, callbacks.LOG_FILE))

  return write, last_step_is_there, True


def _checkpoints(folder):
  encoder = Encoder(backbone=Perceptron(hidden_units=(5,)), embedding_size=3)
  encoder.create_variables((4,))
  checkpoints = Checkpoints(model_dir=folder, encoder=encoder, num_kept=3)

  def write(report):
    checkpoints.save(report.step)
    checkpoints.wait()
    assert (checkpoints.failure is None) == (report.step != 2)

  return write, checkpoints.steps, [3, 1]


def _mining_rounds(folder):
  rounds = make_rounds(folder, miner=mined_round, continues_unwritten=True)
  rounds.resume(0, 50)

  def write(report):
    assert rounds.decide(10 * report.step) == (report.step != 2)

  return write, lambda: RoundLog(folder).decisions(), {10: 10, 30: 30}


CONTINUES = {
  "metrics.jsonl": _metrics,
  "eval/history.jsonl": _evaluations,
  "events": _events,
  "operative_config.gin": _operative_config,
  "eval/metrics.json, before training": _before_training,
  "log.txt": _log,
  "checkpoints": _checkpoints,
  "mining": _mining_rounds,
}


def _text(path):
  return pathlib.Path(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONTINUES)
def test_training_continues_and_writes_the_file_once_there_is_space(name, disk):
  write, found_fn, expected = CONTINUES[name](disk.folder)
  write(_REPORTS[0])
  with disk.full():
    write(_REPORTS[1])
  write(_REPORTS[2])
  assert found_fn() == expected


@pytest.mark.parametrize(
  "name", ["metrics.jsonl", "eval/history.jsonl", "events", "operative_config.gin"]
)
def test_file_whose_first_row_fails_is_written_at_the_end(name, disk):
  write, found_fn, expected = CONTINUES[name](disk.folder)
  with disk.full():
    for report in _REPORTS:
      write(report)
  write.finish()
  assert found_fn() == expected


@pytest.mark.parametrize("name", ["metrics.jsonl", "operative_config.gin"])
def test_finish_raises_if_a_file_could_not_be_written(name, disk):
  write, _, _ = CONTINUES[name](disk.folder)
  with disk.full():
    write(_REPORTS[0])
    with pytest.raises(errors.UnwritableError, match=f"{name} can't be written: "):
      write.finish()


def _config(folder, version):
  run_config._write_config(
    os.path.join(folder, run_config.CONFIG_FILE), f"# {version}\n" * 9_000
  )


def _results(folder, version):
  metrics = {f"eval/recall_at_{k}": float(version) for k in range(9_000)}
  Results(folder).write_latest(1, Measurement(metrics))


def _classes(folder, version):
  rows = [{"class": f"class {number}", "map": version} for number in range(9_000)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(results_lib, "class_rows", lambda *_: rows)
    os.makedirs(os.path.join(folder, "eval"), exist_ok=True)
    nothing = [None] * len(results_lib.EvaluationResult._fields)
    results_lib.EvaluationResult(*nothing).write_classes(folder)


def _report_data(folder, version):
  example_run.report_data(3 + version).write(folder)


def _report(folder, version):
  if version == 1:
    example_run.make(pathlib.Path(folder), has_pictures=False)
  page.write_page(folder)


def _projector(folder, version):
  sample = example_run.report_data().embedding_map
  report_collector.write_projector(
    folder, sample, np.full([60, 99], version, np.float32)
  )


def _embeddings(folder, version):
  writer = EmbeddingWriter(
    os.path.join(folder, "embeddings"),
    shape=(900, 8),
    dtype="float32",
    source={"version": version},
    rows_per_batch=900,
  )
  writer.append(np.full([900, 8], version, np.float32))
  writer.finish(np.zeros(900), map(str, range(900)), ["a"])


def _index(folder, version):
  embeddings = np.full([900, 8], version, np.float32)
  index = faiss_index.build_index(embeddings, "flat")
  faiss_index.write_index(os.path.join(folder, "index"), index, {"version": version})


def _export(folder, version):
  with saved_model.replacing_folder(os.path.join(folder, "export")) as staged:
    _config(staged, version)


def _round(folder, version):
  write_round(folder, 40, **example_arrays(seed=version))


def _ledger(folder, version):
  RoundLog(folder).add(10 * version, None)


def _claim(folder, version):
  del version
  with locked_folder(folder, "training in"):
    pass


def _sweep_table(folder, version):
  del version
  sweep_results.write_csv([], SweepOptions(), os.path.join(folder, "sweep.csv"))


def _sweep_page(folder, version):
  path = os.path.join(folder, "sweep.html")
  spec = type("Spec", (), {"name": f"version {version}", "options": SweepOptions()})
  sweep_results.write_sweep_page([], spec, path)


REFUSES = {
  "config.gin": _config,
  "eval/metrics.json": _results,
  "eval/classes.csv": _classes,
  "eval/report_data.json": _report_data,
  "report.html": _report,
  "projector": _projector,
  "embeddings": _embeddings,
  "index": _index,
  "export": _export,
  "mining round": _round,
  "mining/rounds.jsonl": _ledger,
  "claim": _claim,
  "sweep.csv": _sweep_table,
  "sweep.html": _sweep_page,
}


def _contents(folder):
  """Returns the contents of all files, without the state used to resume."""
  paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in paths
    if path.name != "filler" and path.parent.name != "staging"
  }


@pytest.mark.parametrize("name", REFUSES)
def test_failed_write_raises_and_keeps_the_old_file(name, disk):
  REFUSES[name](disk.folder, 1)
  before = _contents(disk.folder)
  with disk.full():
    with pytest.raises(Exception) as caught:
      REFUSES[name](disk.folder, 2)
    after = _contents(disk.folder)
  error = caught.value
  full = error if isinstance(error, errors.UserError) else errors.out_of_space(error)
  assert full is not None, error
  assert full.exit_status == 2
  assert "No space left" in str(full) or "File too large" in str(full)
  assert after == before


def test_sweep_table_is_written_as_csv(tmp_path):
  path = str(tmp_path / "sweep.csv")
  sweep_results.write_csv([], SweepOptions(), path)
  with open(path, encoding="utf-8", newline="") as file:
    content = file.read()
  assert content.endswith("\r\n")
  assert next(csv.reader(io.StringIO(content)))[0] == "rank"


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (OSError(28, "No space left on device", "/a"), True),
    (OSError(122, "Disk quota exceeded"), True),
    (OSError("1024 requested and 0 written"), True),
    (RuntimeError("write failed: No space left on device"), True),
    (tf.errors.ResourceExhaustedError(None, None, "/a; No space left on device"), True),
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"), False),
    (PermissionError(13, "Permission denied"), False),
    (OSError("no number"), False),
  ],
)
def test_full_disk_is_distinguished_from_other_errors(error, expected):
  full = errors.out_of_space(error)
  assert (full is not None) == expected
  assert not expected or "free some disk space" in str(full)


def test_damaged_row_is_named_and_an_incomplete_one_skipped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2')
  assert [row["step"] for row in MetricsFile(str(tmp_path)).rows()] == [1]
  path.write_text("\0\0\n" + json.dumps({"step": 1}) + "\n")
  with pytest.raises(errors.UserError, match=r"line 1 of .*metrics\.jsonl is damaged"):
    list(MetricsFile(str(tmp_path)).rows())
