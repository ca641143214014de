"""A process that follows a run: its waits and refusals."""

from __future__ import annotations

import pytest

from trainer import task
from trainer.cli import follow
from trainer.errors import UserError

_OPTIONS = follow.FollowOptions(poll_s=0.01, timeout_s=5.0)


def _place(model_dir, step):
  (model_dir / "checkpoints").mkdir(exist_ok=True)
  (model_dir / "checkpoints" / f"ckpt-{step}.json").write_text("{}")


class _Restores:
  """Calls an action, then returns or raises the given result, per restore."""

  def __init__(self, *outcomes):
    self._outcomes = list(outcomes)

  def restore(self, model_dir):
    happen, outcome = self._outcomes.pop(0)
    happen()
    if isinstance(outcome, Exception):
      raise outcome
    return outcome


def _restore_newer(restores, model_dir, step=0):
  return follow.restore_newer(restores, str(model_dir), step, _OPTIONS)


def test_checkpoint_removed_while_it_is_read_is_skipped(tmp_path):
  _place(tmp_path, 10)

  def prune():
    (tmp_path / "checkpoints" / "ckpt-10.json").unlink()
    _place(tmp_path, 20)

  gone = (prune, UserError("no checkpoint is intact: ckpt-10.index is missing"))
  assert _restore_newer(_Restores(gone, (lambda: None, 20)), tmp_path) == 20


def test_unreadable_checkpoint_is_a_user_error(tmp_path):
  _place(tmp_path, 10)
  with pytest.raises(UserError, match="of another encoder"):
    _restore_newer(_Restores((lambda: None, UserError("of another encoder"))), tmp_path)


def test_newer_checkpoint_is_awaited_if_only_an_older_one_is_valid(tmp_path):
  _place(tmp_path, 10)
  _place(tmp_path, 20)
  restores = _Restores(
    (lambda: None, 10), (lambda: _place(tmp_path, 30), 10), (lambda: None, 30)
  )
  assert _restore_newer(restores, tmp_path, step=10) == 30


def test_restarted_training_is_reported_in_one_line(tmp_path):
  _place(tmp_path, 10)
  with pytest.raises(
    UserError, match=r"is of step 10, but one of step 20 was read before"
  ):
    _restore_newer(_Restores(), tmp_path, step=20)


# A config with evaluation and mining, but without training.
_ALONE = """
evaluate.dataset = @Dataset()
Dataset.folder = '{data}'
Dataset.split = @HashSplit()
HashSplit.evaluation_fraction = 0.5
Dataset.decoder = @VectorDecoder()
VectorDecoder.size = 2
evaluate.encoder = @ConvNet()
ConvNet.filters = (4,)
mine.miner = @Miner()
Miner.num_class_neighbours = 2
"""


@pytest.mark.parametrize(
  ("mode", "words"),
  [
    ("follow", "train.loop.num_steps is not a number"),
    ("mine", "train.mining is not set, so the training uses no rounds"),
  ],
)
def test_following_without_a_training_config_is_reported_in_one_line(
  tmp_path, capsys, mode, words
):
  config = tmp_path / "alone.gin"
  config.write_text(_ALONE.format(data=tmp_path / "data"))
  flags = [f"--gin_file={config}", f"--model_dir={tmp_path / 'run'}"]
  assert task.main(["trainer", f"--mode={mode}", *flags]) == 2
  assert words in capsys.readouterr().err


_SELECTION = (
  "train_and_evaluate.early_stopping = @EarlyStopping()",
  "EarlyStopping.every_steps = 5",
)


@pytest.mark.parametrize(
  ("params", "words"),
  [
    (_SELECTION, "already keeps the best encoder"),
    (("evaluate.checkpoint = 'best'",), "follows the newest checkpoints"),
  ],
)
def test_unsupported_configs_are_reported_in_one_line(tmp_path, capsys, params, words):
  flags = ["--gin_file=configs/runs/digits.gin", f"--model_dir={tmp_path / 'run'}"]
  params = (f"DATA_DIR = '{tmp_path / 'data'}'", *params)
  flags += [f"--gin_param={param}" for param in params]
  assert task.main(["trainer", "--mode=follow", *flags]) == 2
  assert words in capsys.readouterr().err
