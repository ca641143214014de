"""Checkpoints: what comes back, how many stay, what is refused."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.loop import run_folder
from trainer.loop.checkpoint import Checkpoints
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder


def _encoder(embedding_size=3):
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(5,)), embedding_size=embedding_size
  )
  encoder.create_variables((4,))
  return encoder


def _checkpoints(tmp_path, encoder, **options):
  optimizer = tf.keras.optimizers.Adam(1e-3)
  optimizer.build(encoder.trainable_variables)
  return Checkpoints(
    model_dir=str(tmp_path), encoder=encoder, optimizer=optimizer, **options
  )


def test_a_run_without_checkpoint_has_nothing_to_restore(tmp_path):
  assert _checkpoints(tmp_path, _encoder()).restore() is None


@pytest.mark.resume
def test_weights_come_back_bit_for_bit(tmp_path):
  saved, restored = _encoder(), _encoder()
  _checkpoints(tmp_path, saved).save(7)
  assert _checkpoints(tmp_path, restored).restore() == 7
  for got, expected in zip(restored.variables, saved.variables):
    np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_an_encoder_comes_back_without_its_optimizer(tmp_path):
  saved, restored = _encoder(), _encoder()
  _checkpoints(tmp_path, saved).save(7)
  assert Checkpoints(model_dir=str(tmp_path), encoder=restored).restore() == 7
  np.testing.assert_array_equal(restored.variables[0], saved.variables[0])


def test_only_the_newest_stay(tmp_path):
  checkpoints = _checkpoints(tmp_path, _encoder(), num_kept=2)
  for step in (1, 2, 3):
    checkpoints.save(step)
  kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.index"))
  assert kept == ["ckpt-2.index", "ckpt-3.index"]


def test_a_checkpoint_of_another_encoder_is_refused(tmp_path):
  _checkpoints(tmp_path, _encoder()).save(1)
  with pytest.raises(UserError, match="does not fit this configuration"):
    _checkpoints(tmp_path, _encoder(embedding_size=9)).restore()


def test_too_little_disk_is_said_before_the_run(tmp_path):
  with pytest.raises(UserError, match="MB free and the checkpoints need"):
    run_folder.check_disk(str(tmp_path), num_bytes=10**18)


def test_a_resume_needs_no_room_for_the_checkpoints_that_are_there(
  tmp_path, monkeypatch
):
  _checkpoints(tmp_path, _encoder(embedding_size=4000)).save(1)
  monkeypatch.setattr(
    "shutil.disk_usage", lambda _: types.SimpleNamespace(free=1_000_000)
  )
  there = sum(f.stat().st_size for f in (tmp_path / "checkpoints").iterdir())
  run_folder.check_disk(str(tmp_path), num_bytes=there + 900_000)
  with pytest.raises(UserError, match=r"1\.0 MB free and the checkpoints need 1\.1 MB"):
    run_folder.check_disk(str(tmp_path), num_bytes=there + 1_100_000)


def test_the_size_of_a_checkpoint_is_foreseen(tmp_path):
  checkpoints = _checkpoints(tmp_path, _encoder(embedding_size=4000))
  checkpoints.save(1)
  data = next((tmp_path / "checkpoints").glob("*.data*")).stat().st_size
  assert checkpoints.num_bytes == pytest.approx(data, rel=0.1)


@pytest.mark.parametrize(
  ("pattern", "damage"),
  [
    ("*.data*", lambda content: b""),
    ("*.data*", lambda content: content[:100]),
    ("*.data*", lambda content: bytes(len(content))),
    ("*.index", lambda content: content[:100]),
  ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, pattern, damage):
  checkpoints = _checkpoints(tmp_path, _encoder())
  checkpoints.save(3)
  file = next((tmp_path / "checkpoints").glob(pattern))
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(UserError, match="ckpt-3 can't be read") as caught:
    checkpoints.restore()
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="ckpt-3 can't be read"):
    Checkpoints(model_dir=str(tmp_path), encoder=_encoder()).restore()


@pytest.mark.parametrize(
  ("pattern", "message"),
  [("*.index", r"ckpt-3.index is missing"), ("*.data*", "ckpt-3 can't be read")],
)
def test_a_file_that_is_missing_is_named_and_the_run_not_begun_again(
  tmp_path, pattern, message
):
  checkpoints = _checkpoints(tmp_path, _encoder())
  checkpoints.save(3)
  next((tmp_path / "checkpoints").glob(pattern)).unlink()
  with pytest.raises(UserError, match=message):
    checkpoints.restore()


def test_a_damaged_list_of_checkpoints_is_named(tmp_path):
  _checkpoints(tmp_path, _encoder()).save(3)
  for content in ("", "{"):
    (tmp_path / "checkpoints" / "checkpoint").write_text(content)
    with pytest.raises(UserError, match="checkpoints/checkpoint can't be read"):
      _checkpoints(tmp_path, _encoder()).restore()
