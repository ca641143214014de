"""Checkpoints: restored values, retention, damage and refused checkpoints."""

from __future__ import annotations

import pathlib
import types

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import NotFiniteError, UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import checkpoint, checkpoint_files, run_folder
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.optimizers import MultiOptimizer


def _encoder(embedding_size=3):
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(5,)), embedding_size=embedding_size
  )
  encoder.create_variables((4,))
  return encoder


class _Written(Checkpoints):
  """Checkpoints that wait until each save is written."""

  def save(self, step):
    super().save(step)
    self.wait()


def _checkpoints(tmp_path, encoder, **options):
  optimizer = tf.keras.optimizers.Adam(1e-3)
  optimizer.build(encoder.trainable_variables)
  return _Written(
    model_dir=str(tmp_path),
    encoder=encoder,
    training=TrainingState(optimizer),
    **options,
  )


def test_run_without_a_checkpoint_restores_nothing(tmp_path):
  assert _checkpoints(tmp_path, _encoder()).restore() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_are_never_saved(tmp_path, bad):
  encoder = _encoder()
  checkpoints = _checkpoints(tmp_path, encoder)
  checkpoints.save(6)
  weight = encoder.trainable_variables[0]
  weight.assign(tf.tensor_scatter_nd_update(weight, [[0, 1]], [bad]))
  expected = "step 7: encoder/.*kernel .1 in all. not finite .* checkpoint is of step 6"
  with pytest.raises(NotFiniteError, match=expected):
    checkpoints.save(7)
  checkpoints.wait()
  assert checkpoints.steps() == [6]


@pytest.mark.resume
def test_step_counters_of_both_optimizers_are_restored(tmp_path):
  encoder = _encoder()
  optimizer = MultiOptimizer(
    backbone=tf.keras.optimizers.SGD(0.1), head=tf.keras.optimizers.SGD(0.1)
  )
  optimizer.divide(encoder.backbone_variables)
  optimizer.build(encoder.trainable_variables)
  optimizer.head.iterations.assign(7)  # The state after a run with skipped batches.
  checkpoints = _Written(
    model_dir=str(tmp_path), encoder=encoder, training=TrainingState(optimizer)
  )
  checkpoints.save(7)
  assert checkpoints.restore() == 7
  assert [int(part.iterations) for part in optimizer.parts] == [7, 7]


@pytest.mark.resume
def test_weights_are_restored_bit_for_bit(tmp_path):
  saved, restored = _encoder(), _encoder()
  _checkpoints(tmp_path, saved).save(7)
  assert _checkpoints(tmp_path, restored).restore() == 7
  for got, expected in zip(restored.variables, saved.variables):
    np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_encoder_is_restored_without_its_optimizer(tmp_path):
  saved, restored = _encoder(), _encoder()
  _checkpoints(tmp_path, saved).save(7)
  assert Checkpoints(model_dir=str(tmp_path), encoder=restored).restore() == 7
  np.testing.assert_array_equal(restored.variables[0], saved.variables[0])


def test_values_cached_by_a_layer_follow_the_restored_weights(tmp_path):
  def normalizing(mean, variance):
    layer = tf.keras.layers.Normalization()
    encoder = Encoder(backbone=tf.keras.Sequential([layer]), embedding_size=3)
    encoder.create_variables((4,))
    layer.set_weights([np.full(4, mean), np.full(4, variance), np.int64(1)])
    layer.finalize_state()
    return encoder

  saved, restored = normalizing(0.5, 0.25), normalizing(0.0, 1.0)
  _checkpoints(tmp_path, saved).save(7)
  assert Checkpoints(model_dir=str(tmp_path), encoder=restored).restore() == 7
  inputs = tf.constant([[0.1, 0.9, 0.4, 0.7]])
  np.testing.assert_array_equal(restored(inputs), saved(inputs))


def test_restoring_creates_no_synchronized_variable(tmp_path, mirrored):
  made = []

  def note(next_creator, **options):
    made.append(options.get("name"))
    return next_creator(**options)

  with mirrored(2).scope(), tf.variable_creator_scope(note):
    checkpoints = _checkpoints(tmp_path, _encoder())
    checkpoints.save(7)
    num_before = len(made)
    assert num_before > 0 and checkpoints.restore() == 7
  assert made[num_before:] == []


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  checkpoints = _checkpoints(tmp_path, _encoder(), num_kept=2)
  for step in (1, 2, 3):
    checkpoints.save(step)
  kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.index"))
  assert kept == ["ckpt-2.index", "ckpt-3.index"]


def test_checkpoint_of_another_encoder_is_refused(tmp_path):
  _checkpoints(tmp_path, _encoder()).save(1)
  with pytest.raises(UserError, match="does not fit this configuration"):
    _checkpoints(tmp_path, _encoder(embedding_size=9)).restore()


def test_insufficient_disk_space_is_reported_before_the_run(tmp_path):
  with pytest.raises(UserError, match="MB free and the checkpoints need"):
    run_folder.check_disk(str(tmp_path), num_bytes=10**18)


def test_resuming_needs_no_space_for_existing_checkpoints(tmp_path, monkeypatch):
  _checkpoints(tmp_path, _encoder(embedding_size=4000)).save(1)
  monkeypatch.setattr(
    "shutil.disk_usage", lambda _: types.SimpleNamespace(free=1_000_000)
  )
  there = sum(f.stat().st_size for f in (tmp_path / "checkpoints").iterdir())
  run_folder.check_disk(str(tmp_path), num_bytes=there + 900_000)
  with pytest.raises(UserError, match=r"1\.0 MB free and the checkpoints need 1\.1 MB"):
    run_folder.check_disk(str(tmp_path), num_bytes=there + 1_100_000)


def test_size_of_a_checkpoint_is_estimated(tmp_path):
  checkpoints = _checkpoints(tmp_path, _encoder(embedding_size=4000))
  checkpoints.save(1)
  data = next((tmp_path / "checkpoints").glob("*.data*")).stat().st_size
  assert checkpoints.num_bytes == pytest.approx(data, rel=0.1)


def _two_saved(tmp_path):
  """Returns an encoder with checkpoints at steps 3 and 6, and its values at 3."""
  encoder = _encoder()
  checkpoints = _checkpoints(tmp_path, encoder, num_kept=2)
  checkpoints.save(3)
  before = encoder.variables[0].numpy()
  encoder.variables[0].assign_add(tf.ones_like(before))
  checkpoints.save(6)
  return before


def _flipped(content):
  return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:100], _flipped])
@pytest.mark.parametrize("name", ["ckpt-6.data-00000-of-00001", "ckpt-6.index"])
def test_damaged_checkpoint_is_named_and_the_previous_one_restored(
  tmp_path, caplog, name, damage
):
  before = _two_saved(tmp_path)
  file = tmp_path / "checkpoints" / name
  file.write_bytes(damage(file.read_bytes()))
  encoder = _encoder()
  with caplog.at_level("WARNING", logger="absl"):
    assert _checkpoints(tmp_path, encoder).restore() == 3
  np.testing.assert_array_equal(encoder.variables[0].numpy(), before)
  [warning] = caplog.messages
  assert str(file) in warning and "resuming from the checkpoint of step 3" in warning


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "damaged (JSONDecodeError"),
    (b"{}", "damaged (KeyError: 'step')"),
    (b'{"step": 5, "files": {}}', "it is of step 5"),
    (b'{"step": 6, "files": []}', "damaged (AttributeError"),
    (b'{"step": 6, "files": {"../../etc/passwd": {}}}', "damaged (KeyError"),
    (b" " * 2_000_000, "more than 1000000 bytes"),
    (b"\x80\x04\x95", "damaged (UnicodeDecodeError"),
  ],
)
def test_checkpoint_with_a_damaged_manifest_is_named_and_skipped(
  tmp_path, caplog, content, words
):
  _two_saved(tmp_path)
  (tmp_path / "checkpoints" / "ckpt-6.json").write_bytes(content)
  assert _checkpoints(tmp_path, _encoder()).restore() == 3
  assert words in caplog.messages[0]


def test_checkpoint_with_a_missing_file_is_named_and_skipped(tmp_path, caplog):
  _two_saved(tmp_path)
  (tmp_path / "checkpoints" / "ckpt-6.index").unlink()
  assert _checkpoints(tmp_path, _encoder()).restore() == 3
  assert "ckpt-6.index is missing" in caplog.messages[0]


def test_run_does_not_restart_if_all_checkpoints_are_damaged(tmp_path):
  _two_saved(tmp_path)
  for path in (tmp_path / "checkpoints").glob("*.index"):
    path.write_bytes(b"")
  with pytest.raises(UserError, match=r"no checkpoint in .* is intact: .*ckpt-6.ind"):
    _checkpoints(tmp_path, _encoder()).restore()


def test_partial_checkpoint_of_a_killed_process_is_ignored_and_removed(tmp_path):
  folder = tmp_path / "checkpoints"
  (folder / "staging").mkdir(parents=True)
  for name in ("staging/ckpt-4.index", "ckpt-4.data-00000-of-00001", "ckpt-4.index"):
    (folder / name).write_bytes(b"torn")
  checkpoints = _checkpoints(tmp_path, _encoder())
  assert checkpoints.restore() is None
  checkpoints.save(6)
  names = sorted(path.name for path in folder.iterdir())
  files = [f"ckpt-6.{end}" for end in ("data-00000-of-00001", "index", "json")]
  assert names == ["checkpoint", *files]


def test_tensorflow_finds_the_newest_checkpoint(tmp_path):
  _two_saved(tmp_path)
  newest = tf.train.latest_checkpoint(str(tmp_path / "checkpoints"))
  assert newest.endswith("ckpt-6")


def test_checkpoint_with_a_forged_size_allocates_no_memory(tmp_path):
  folder = tmp_path / "checkpoints"
  _checkpoints(tmp_path, _encoder()).save(3)
  staging_dir = pathlib.Path(checkpoint_files.create_staging_dir(str(folder)))
  with open(staging_dir / "ckpt-6.data-00000-of-00001", "wb") as file:
    file.truncate(100)
  checkpoint.write_snapshot(
    {"encoder/x": np.zeros([1000], np.float32)}, str(staging_dir / "ckpt-6")
  )
  with open(staging_dir / "ckpt-6.data-00000-of-00001", "r+b") as file:
    file.truncate(100)
  checkpoint_files.publish(str(folder), 6, {})
  with pytest.raises(
    UserError, match="lists 4000 bytes of tensors, and its data has 100"
  ):
    _checkpoints(tmp_path, _encoder()).restore()


def test_saved_values_are_those_at_the_time_of_the_call(tmp_path):
  encoder = _encoder()
  checkpoints = _checkpoints(tmp_path, encoder)
  expected = [variable.numpy().copy() for variable in encoder.variables]
  Checkpoints.save(checkpoints, 3)
  for _ in range(100):
    for variable in encoder.variables:
      variable.assign_add(tf.ones_like(variable))
  checkpoints.wait()
  restored = _encoder()
  _checkpoints(tmp_path, restored).restore()
  for got, value in zip(restored.variables, expected):
    np.testing.assert_array_equal(got.numpy(), value)
