"""Mining rounds on disk: atomic writes and validated reads."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from tests.mining.corpora import FINGERPRINT, example_arrays, write_round
from trainer.errors import UserError
from trainer.mining import round
from trainer.mining.miner import RoundContent
from trainer.mining.round import MiningRound
from trainer.runtime.filesystem import sha256_of


def _open(folder, step=40, fingerprint=FINGERPRINT):
  return MiningRound(str(folder), step, fingerprint)


def test_round_is_read_as_it_was_written(tmp_path):
  arrays = example_arrays()
  neighbours = np.full((9, 2), -1)
  write_round(tmp_path, 40, **arrays, class_neighbours=neighbours)
  found = _open(tmp_path)
  assert found.metadata["counts"]["anchors"] == 20
  assert set(found.arrays) == {*arrays, "class_neighbours"}
  for name, array in arrays.items():
    assert found.arrays[name].dtype == np.int32
    assert isinstance(found.arrays[name], np.memmap)
    np.testing.assert_array_equal(found.arrays[name], array)


def test_rounds_are_listed_newest_first_without_set_aside_ones(tmp_path):
  assert round.round_steps(str(tmp_path)) == []
  for step in (40, 1_200_000_000, 400):
    write_round(tmp_path, step, **example_arrays())
  (tmp_path / "mining" / "staging").mkdir()
  (tmp_path / "mining" / "rounds.jsonl").write_text("")
  assert round.round_steps(str(tmp_path)) == [1_200_000_000, 400, 40]
  round.remove_round(str(tmp_path), 400)
  assert round.round_steps(str(tmp_path)) == [1_200_000_000, 40]


def test_failed_write_keeps_the_old_round(tmp_path, monkeypatch):
  write_round(tmp_path, 40, **example_arrays())

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(round.np, "save", full)
  with pytest.raises(UserError, match=r"round of step 40 can't .*: No space left"):
    write_round(tmp_path, 40, **example_arrays(seed=1))
  found = _open(tmp_path).arrays["positives"]
  np.testing.assert_array_equal(found, example_arrays()["positives"])
  assert not (tmp_path / "mining" / "staging").exists()


def _write_for_ever(folder):
  for step in itertools.count(1):
    write_round(folder, step % 3, **example_arrays(num_anchors=20, seed=step))


def test_killed_writer_leaves_only_complete_rounds(tmp_path):
  context = multiprocessing.get_context("fork")
  num_seen = 0
  for number in range(8):
    writer = context.Process(target=_write_for_ever, args=(tmp_path,))
    writer.start()
    deadline_s = time.monotonic() + 30
    while len(round.round_steps(str(tmp_path))) < 2 and time.monotonic() < deadline_s:
      time.sleep(0.001)
    time.sleep(0.003 * number)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    for step in round.round_steps(str(tmp_path)):
      assert len(_open(tmp_path, step).arrays) == 3
      num_seen += 1
  assert num_seen >= 8


def _replace_and_die(folder, call_name, num_calls):
  """Replaces the round; the process is killed at a call of a function of `os`."""
  calls, call = itertools.count(), getattr(os, call_name)

  def call_or_die(*arguments, **options):
    if next(calls) == num_calls:
      os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)

  setattr(os, call_name, call_or_die)
  write_round(folder, 40, **example_arrays(seed=1))


@pytest.mark.parametrize(
  ("call_name", "num_calls", "seed"),
  [("replace", 0, 0), ("replace", 1, 0), ("unlink", 1, 1), ("rmdir", 0, 1)],
)
def test_round_survives_a_killed_replacement(tmp_path, call_name, num_calls, seed):
  write_round(tmp_path, 40, **example_arrays())
  context = multiprocessing.get_context("fork")
  arguments = (tmp_path, call_name, num_calls)
  writer = context.Process(target=_replace_and_die, args=arguments)
  writer.start()
  writer.join()
  assert writer.exitcode == -signal.SIGKILL
  assert round.round_steps(str(tmp_path)) == [40]
  assert round.round_time(str(tmp_path), 40)
  found = _open(tmp_path).arrays["positives"]
  wanted = example_arrays(seed=seed)["positives"]
  np.testing.assert_array_equal(found, wanted)
  write_round(tmp_path, 40, **example_arrays(seed=2))
  assert sorted(os.listdir(tmp_path / "mining")) == ["round-00000040"]


def _cut(folder):
  path = folder / "negatives.npy"
  path.write_bytes(path.read_bytes()[:-4])


def _flip(folder):
  path = folder / "anchors.npy"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def _drop(folder):
  (folder / "positives.npy").unlink()


def _change_manifest(**changed):
  def change(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in changed.items():
      if value is None:
        del manifest[name]
      else:
        manifest[name] = value
    path.write_text(json.dumps(manifest))

  return change


def _forget_an_array(folder):
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["files"]["positives"]
  path.write_text(json.dumps(manifest))


def _claim_another_shape(folder):
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["files"]["anchors"]["shape"] = [10, 2]
  path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_cut, r"negatives.npy is damaged \(it has \d+ bytes instead of"),
    (_flip, r"anchors.npy is damaged \(its SHA-256 differs"),
    (_drop, r"positives.npy is damaged \(No such file"),
    (
      _claim_another_shape,
      r"anchors.npy is damaged \(it has int32\[20\], but",
    ),
    (_forget_an_array, "arrays of inconsistent sizes"),
    (_change_manifest(files=None), "has a damaged manifest"),
    (_change_manifest(files=7), "has a damaged manifest"),
    (_change_manifest(fingerprint=[]), "has a damaged manifest"),
    (
      _change_manifest(fingerprint={}),
      "mined from other data: the number of records was",
    ),
    (_change_manifest(num_records=30), "values outside -1 to 29"),
    (lambda folder: (folder / "manifest.json").unlink(), "not a complete mining round"),
    (
      lambda folder: (folder / "manifest.json").write_text("{"),
      "not a complete mining round",
    ),
  ],
)
def test_damaged_round_is_refused_in_one_line(tmp_path, harm, message):
  write_round(tmp_path, 40, **example_arrays())
  harm(tmp_path / "mining" / "round-00000040")
  with pytest.raises(UserError, match=message):
    _open(tmp_path)


def test_pickled_array_is_not_opened(tmp_path):
  write_round(tmp_path, 40, **example_arrays())
  folder = tmp_path / "mining" / "round-00000040"
  np.save(folder / "anchors.npy", np.array([print], object), allow_pickle=True)
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  content = folder / "anchors.npy"
  manifest["files"]["anchors"] = {
    "bytes": content.stat().st_size,
    "sha256": sha256_of(str(content)),
    "shape": [1],
  }
  path.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match=r"anchors.npy is damaged \(it is not an array"):
    _open(tmp_path)


def test_a_round_of_other_data_is_refused(tmp_path):
  write_round(tmp_path, 40, **example_arrays())
  with pytest.raises(UserError, match="the number of records was 60 and is 61"):
    _open(tmp_path, fingerprint={"the number of records": 61})


def test_an_empty_round_is_written_and_read(tmp_path):
  round.write_round(
    str(tmp_path),
    40,
    RoundContent({}, {}),
    fingerprint={},
    num_records=0,
    num_classes=0,
  )
  assert MiningRound(str(tmp_path), 40, {}).arrays == {}
