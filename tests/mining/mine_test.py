"""Mode `mine`: a separate process that mines each checkpoint of a training."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

from tests.mining.corpora import example_arrays
from trainer.cli import mine
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining import round
from trainer.mining.miner import RoundContent

_INDEX = types.SimpleNamespace(fingerprint=dict, num_records=60, num_classes=9)
_DATASET = types.SimpleNamespace(index=_INDEX, train_classes=np.arange(5))


class _Miner:
  """A miner without hard examples at some steps."""

  uses_centres = False

  def __init__(self, *bare_steps):
    self._bare_steps = bare_steps

  def check(self, dataset):
    assert dataset is _DATASET

  def embedder(self, encoder, dataset):
    return None

  def mine(self, embedder, dataset, step, centres):
    assert centres is None
    if step in self._bare_steps:
      raise TooFewExamplesError(f"nothing is hard in step {step}.")
    return RoundContent(example_arrays(), {"counts": {}})


def _mine(folder, monkeypatch, *bare_steps):
  """Mines after steps 10, 20, 30 of 40."""
  monkeypatch.setattr(mine, "restore_newer", lambda _, folder, step, options: step + 10)
  run = types.SimpleNamespace(
    model_dir=str(folder),
    config=types.SimpleNamespace(values={"train.loop.num_steps": "40"}),
  )
  evaluation = types.SimpleNamespace(dataset=_DATASET, encoder=None)
  mine._mine(run, mine.MineOptions(miner=_Miner(*bare_steps)), evaluation)
  return round.round_steps(str(folder))


def test_every_checkpoint_but_the_last_is_mined_once(tmp_path, monkeypatch):
  assert _mine(tmp_path, monkeypatch) == [30, 20, 10]


def test_next_checkpoint_is_mined_if_no_hard_examples_are_found(
  tmp_path, monkeypatch, caplog
):
  assert _mine(tmp_path, monkeypatch, 20) == [30, 10]
  assert "nothing is hard in step 20. The previous round" in caplog.text


def test_miner_stops_if_the_first_checkpoint_has_no_hard_examples(
  tmp_path, monkeypatch
):
  with pytest.raises(TooFewExamplesError, match="in step 10"):
    _mine(tmp_path, monkeypatch, 10)


def test_damaged_round_is_mined_again(tmp_path, monkeypatch, caplog):
  _mine(tmp_path, monkeypatch)
  path = tmp_path / "mining" / "round-00000030" / "anchors.npy"
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  assert _mine(tmp_path, monkeypatch) == [30, 20, 10]
  assert path.read_bytes() == whole
  assert "anchors.npy is damaged" in caplog.text


# Holds the claim until its input ends.
_OTHER = """
import sys
from trainer.runtime import lease
with lease.holding_lease(sys.argv[1], "mining into"):
  print("here", flush=True)
  sys.stdin.read()
"""


def test_second_process_is_refused_while_the_first_runs(tmp_path, monkeypatch):
  (tmp_path / "mining").mkdir()
  other = subprocess.Popen(
    [sys.executable, "-c", _OTHER, str(tmp_path / "mining")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert other.stdout.readline() == "here\n"
    with pytest.raises(UserError, match=f"process {other.pid} of .* is mining into"):
      _mine(tmp_path, monkeypatch)
    assert round.round_steps(str(tmp_path)) == []
    other.kill()
    other.wait()
    assert _mine(tmp_path, monkeypatch) == [30, 20, 10]
  finally:
    other.kill()


def test_unwritable_folder_is_reported_in_one_line(tmp_path, monkeypatch):
  (tmp_path / "run").write_text("no folder")
  with pytest.raises(UserError, match=r"--model_dir=.*run can't be written to: "):
    _mine(tmp_path / "run", monkeypatch)
