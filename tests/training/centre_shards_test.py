"""Class centres in training: equal on any number of replicas, saved and restored."""

from __future__ import annotations

import functools
import os
import threading

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data.pipeline import PADDING_LABEL, Batch
from trainer.distribute.collectives import OneReplica
from trainer.errors import NotFiniteError, UserError
from trainer.losses.centre_losses import ArcFaceLoss
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import centre_shards, checkpoint_files, parity
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.options import StepOptions
from trainer.training.row_optimizers import RowAdam, RowSGD
from trainer.training.step import TrainStep

_NUM_CLASSES, _BATCH, _NUM_STEPS = 37, 24, 6
_OPTIMIZERS = {
  "sgd": lambda: RowSGD(learning_rate=0.1, momentum=0.9, weight_decay=0.01),
  "adam": lambda: RowAdam(learning_rate=0.01),
}


def _make_step(
  rate=1.0,
  optimizer="adam",
  centres_per_class=1,
  names=range(37),
  encoder=None,
  options=StepOptions(),  # noqa: B008  It is frozen.
):
  tf.keras.utils.set_random_seed(1)
  step = TrainStep(
    encoder=encoder or Encoder(backbone=Perceptron(hidden_units=()), embedding_size=6),
    loss=ArcFaceLoss(
      centres=ClassCentres(
        optimizer=_OPTIMIZERS[optimizer](),
        sampling_rate=rate,
        centres_per_class=centres_per_class,
      ),
      scale=8.0,
    ),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.Adam(0.01),
    mining_statistics=None,
    options=options,
  )
  hashes = np.array([1 + 7 * name for name in names], np.uint64)
  labels = np.arange(len(names))
  step.create_variables((5,), TrainingClasses(labels, name_hashes=hashes))
  return step


def _batches(num_steps=_NUM_STEPS):
  rng = np.random.default_rng(0)
  batches = []
  for _ in range(num_steps):
    labels = rng.integers(0, _NUM_CLASSES, _BATCH).astype(np.int32)
    labels[-2:] = PADDING_LABEL
    batches.append(
      Batch(
        rng.normal(size=(_BATCH, 5)).astype(np.float32),
        labels,
        (labels != PADDING_LABEL).astype(np.float32),
        np.arange(_BATCH, dtype=np.int32),
      )
    )
  return batches


def _rows(step):
  """Returns centres and moments of all classes of this process."""
  [table] = step.loss.tables
  return np.concatenate([values for _, values in table.local_rows()])


_KINDS = [(1.0, "adam", 1), (1.0, "sgd", 3), (0.3, "sgd", 1), (0.3, "adam", 2)]
_NORMAL = [(2, 1.0, "sgd", 3), (4, 0.3, "adam", 2)]


@pytest.mark.parity
@pytest.mark.parametrize(
  ("num_replicas", "rate", "optimizer", "centres_per_class"),
  thorough_except(_NORMAL, [(r, *kind) for kind in _KINDS for r in (2, 4, 8)]),
)
def test_replicas_train_the_centres_of_one_replica(
  mirrored, num_replicas, rate, optimizer, centres_per_class
):
  steps = []

  def make_step():
    steps.append(_make_step(rate, optimizer, centres_per_class))
    return steps[-1]

  wanted = parity.expected(make_step, _batches(), num_replicas)
  got = parity.trained(mirrored(num_replicas), make_step, _batches())
  found = parity.errors(got, wanted)
  assert parity.is_equal(found), parity.table([("centres", found)])
  expected, rows = map(_rows, steps)
  np.testing.assert_allclose(rows, expected, atol=1e-5 * np.abs(expected).max())
  assert not np.allclose(
    expected, _rows(_make_step(rate, optimizer, centres_per_class))
  )


def _checkpoints(step, folder, **options):
  return Checkpoints(
    model_dir=str(folder),
    encoder=step.encoder,
    training=TrainingState(step.optimizer, step.loss),
    num_kept=2,
    **options,
  )


def _train(strategy, folder, batches, rate):
  """Restores a checkpoint if any, trains, saves; returns rows and weights."""
  with strategy.scope():
    step = _make_step(rate)
    checkpoints = _checkpoints(step, folder)
    first = checkpoints.restore() or 0
    parity.trained(strategy, lambda: step, batches)
    checkpoints.save(first + len(batches))
    checkpoints.wait()
    assert checkpoints.failure is None
    return [_rows(step), *(each.numpy() for each in step.trainable_variables)]


def _save_random(strategy, folder, number):
  """Restores a checkpoint if any, saves random rows as step `number`; returns them."""
  with strategy.scope():
    step = _make_step(0.3)
    checkpoints = _checkpoints(step, folder)
    checkpoints.restore()
    [table] = step.loss.tables
    random = np.random.default_rng(number)
    rows = random.normal(size=_rows(step).shape).astype(np.float32)
    table.assign_rows(lambda first, last: rows[first:last])
    checkpoints.save(number)
    checkpoints.wait()
  assert checkpoints.failure is None
  return rows


def _restored(strategy, folder):
  with strategy.scope():
    step = _make_step(0.3)
    _checkpoints(step, folder).restore()
    return _rows(step)


@pytest.mark.resume
@pytest.mark.parametrize("rate", thorough_except([0.3], [1.0, 0.3]))
def test_resumed_training_is_bit_identical(mirrored, tmp_path, rate):
  run = functools.partial(_train, mirrored(2), rate=rate)
  whole = run(tmp_path / "whole", _batches())
  run(tmp_path / "parts", _batches()[:4])
  parts = run(tmp_path / "parts", _batches()[4:])
  for one, other in zip(whole, parts):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_replicas", [1, 2, 8])
def test_rows_of_four_replicas_are_restored_on_others(mirrored, tmp_path, num_replicas):
  saved = _save_random(mirrored(4), tmp_path, 3)
  np.testing.assert_array_equal(_restored(mirrored(num_replicas), tmp_path), saved)


def _shards(folder):
  return sorted((folder / "checkpoints").glob("ckpt-*.centres-*.npy"))


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_shard_is_detected_and_the_older_checkpoint_restored(
  mirrored, tmp_path, harm, caplog
):
  strategy = mirrored(2)
  older = _save_random(strategy, tmp_path, 2)
  _save_random(strategy, tmp_path, 4)
  shard = _shards(tmp_path)[-1]
  assert shard.name.startswith("ckpt-4.")
  if harm == "remove":
    shard.unlink()
  elif harm == "truncate":
    os.truncate(shard, 100)
  else:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
  np.testing.assert_array_equal(_restored(strategy, tmp_path), older)


def test_failed_save_leaves_no_rows_and_keeps_the_older_checkpoint(mirrored, tmp_path):
  strategy = mirrored(2)
  older = _save_random(strategy, tmp_path, 2)
  with strategy.scope():
    step = _make_step(0.3)
    checkpoints = _checkpoints(step, tmp_path)
    checkpoints.restore()
    # A folder at the path of the second replica's file.
    name = _shards(tmp_path)[1].name.replace("ckpt-2", "ckpt-4")
    (tmp_path / "checkpoints" / name).mkdir()
    checkpoints.save(4)
    checkpoints.wait()
  assert "the checkpoint of step 4 can't be written" in checkpoints.failure
  left = (tmp_path / "checkpoints").glob("ckpt-4*")
  assert [path.name for path in left] == [name]
  (tmp_path / "checkpoints" / name).rmdir()
  np.testing.assert_array_equal(_restored(strategy, tmp_path), older)


def test_nonfinite_rows_of_one_replica_are_not_saved(mirrored, tmp_path):
  with mirrored(2).scope():
    step = _make_step()
    [table] = step.loss.tables
    rows = _rows(step)
    rows[-1, 0, 0] = np.inf
    table.assign_rows(lambda first, last: rows[first:last])
    with pytest.raises(NotFiniteError, match=r"centres-0-0000000019-0000000037"):
      _checkpoints(step, tmp_path).save(1)
  assert not (tmp_path / "checkpoints").exists()


def test_chief_does_not_wait_for_an_exited_worker(tmp_path, monkeypatch):
  monkeypatch.setattr(centre_shards, "_DEADLINE_OF_END_S", 0.1)
  is_ending = threading.Event()
  is_ending.set()
  with pytest.raises(OSError, match=r"rows.npy was not written by its worker"):
    centre_shards.collect_facts(str(tmp_path), ["rows.npy"], "save", is_ending)


def test_worker_with_a_full_disk_informs_the_chief(tmp_path):
  (tmp_path / "two.npy").mkdir()
  rows = [centre_shards.Rows(name, np.ones(3)) for name in ("one.npy", "two.npy")]
  with pytest.raises(OSError):
    centre_shards.write_rows(str(tmp_path), rows, "save")
  with pytest.raises(OSError, match=r"two.npy"):
    centre_shards.collect_facts(str(tmp_path), ["one.npy", "two.npy"], "save")
  assert not (tmp_path / "one.npy").exists()


def test_files_of_another_save_are_not_published(tmp_path, monkeypatch):
  monkeypatch.setattr(centre_shards, "_DEADLINE_S", 0.1)
  rows = [centre_shards.Rows("rows.npy", np.ones(3))]
  centre_shards.write_rows(str(tmp_path), rows, "an earlier save")
  with pytest.raises(OSError, match=r"rows\.npy was not written by its worker"):
    centre_shards.collect_facts(str(tmp_path), ["rows.npy"], "save")
  centre_shards.write_rows(str(tmp_path), rows, "save")
  found = centre_shards.collect_facts(str(tmp_path), ["rows.npy"], "save")
  assert found == {"rows.npy": centre_shards.facts(str(tmp_path / "rows.npy"))}


@pytest.mark.parametrize(("scale", "is_applied"), [(2.0**40, False), (1.0, True)])
def test_step_skipped_by_the_loss_scale_leaves_the_centres(scale, is_applied):
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(7,)), embedding_size=6, precision="mixed_float16"
  )
  step = _make_step(encoder=encoder)
  step.optimizer._loss_scale._current_loss_scale.assign(scale)
  before = _rows(step)
  result = step.compute_update(_batches()[0], OneReplica())
  assert result.is_finite
  step.apply_update(result.update)
  assert np.any(_rows(step) != before) == is_applied


def test_only_kept_checkpoints_have_shards(mirrored, tmp_path):
  for step in (2, 4, 6):
    _save_random(mirrored(2), tmp_path, step)
  steps = {path.name.split(".")[0] for path in _shards(tmp_path)}
  assert steps == {"ckpt-4", "ckpt-6"}
  assert not list((tmp_path / "checkpoints").glob("*.npy.*"))


def test_files_of_a_killed_process_are_removed_before_the_step_is_saved_again(
  mirrored, tmp_path
):
  _save_random(mirrored(2), tmp_path, 2)
  folder = tmp_path / "checkpoints"
  left = [path.name.replace("ckpt-2", "ckpt-4") for path in _shards(tmp_path)]
  for name in [*left, *(f"{name}.json" for name in left)]:
    (folder / name).write_text('{"bytes": 1, "sha256": "0"}')
  _save_random(mirrored(2), tmp_path, 4)
  assert checkpoint_files.fault(str(folder), 4) is None
  assert not list(folder.glob("*.npy.json"))


def test_encoder_is_restored_without_the_centres(mirrored, tmp_path):
  _save_random(mirrored(2), tmp_path, 2)
  for shard in _shards(tmp_path):
    shard.unlink()
  encoder = Encoder(backbone=Perceptron(hidden_units=()), embedding_size=6)
  encoder.create_variables((5,))
  assert Checkpoints(model_dir=str(tmp_path), encoder=encoder).restore() == 2


def _saved(folder, names):
  """Saves centres of classes with these names and returns their rows."""
  step = _make_step(names=names)
  checkpoints = _checkpoints(step, folder)
  checkpoints.save(1)
  checkpoints.wait()
  return _rows(step)


def test_different_classes_are_refused_without_the_flag(tmp_path):
  _saved(tmp_path, names=range(37))
  other = _checkpoints(_make_step(names=range(7, 37)), tmp_path)
  with pytest.raises(UserError, match=r"centres of 37 classes, .* has 30: 30 are kept"):
    other.restore()


@pytest.mark.parametrize(
  "names", [range(7, 37), range(36, -1, -1), [40, 3, 41, 0], range(50, 60)]
)
def test_centres_of_common_classes_are_kept(tmp_path, names):
  saved = _saved(tmp_path, names=range(37))
  step = _make_step(names=names)
  new = _rows(step)
  _checkpoints(step, tmp_path, allows_other_classes=True).restore()
  expected = [saved[name] if name < 37 else new[row] for row, name in enumerate(names)]
  np.testing.assert_array_equal(_rows(step), expected)


def test_moments_of_another_optimizer_are_refused(tmp_path):
  checkpoints = _checkpoints(_make_step(), tmp_path)
  checkpoints.save(1)
  checkpoints.wait()
  with pytest.raises(UserError, match=r"have 2 moments .* has 1"):
    _checkpoints(_make_step(optimizer="sgd"), tmp_path).restore()


def test_sample_smaller_than_the_batch_is_refused():
  centres = ClassCentres(optimizer=RowSGD(learning_rate=0.1), sampling_rate=0.1)
  centres.check_batch(10, 100)
  with pytest.raises(UserError, match=r"0.1 of 100 classes is 10, fewer than the 11"):
    centres.check_batch(11, 100)


def test_number_of_classes_other_than_that_of_the_data_is_refused():
  centres = ClassCentres(optimizer=RowSGD(learning_rate=0.1), num_classes=5)
  with pytest.raises(UserError, match="num_classes=5, and the training data has 6"):
    centres.create_variables(4, TrainingClasses(range(6)))


def _never_seen(strategy, step, batch):
  """Returns the fraction of classes that were in no batch before this one."""
  with strategy.scope():
    outcome = parity.trained(strategy, lambda: step, [batch])
  return outcome.statistics["centres/never_seen"]


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_fraction_of_classes_never_seen_is_counted_and_restored(
  mirrored, tmp_path, num_replicas
):
  batches = _batches()
  seen = np.unique(np.concatenate([batches[0].labels, batches[1].labels]))
  seen = seen[seen != PADDING_LABEL]
  strategy, other = mirrored(2), mirrored(num_replicas)
  with strategy.scope():
    step = _make_step(0.3)
    assert _never_seen(strategy, step, batches[0]) == 1
    _never_seen(strategy, step, batches[1])
    checkpoints = _checkpoints(step, tmp_path)
    checkpoints.save(2)
    checkpoints.wait()
  with other.scope():
    step = _make_step(0.3)
    _checkpoints(step, tmp_path).restore()
  expected = 1 - len(seen) / _NUM_CLASSES
  np.testing.assert_allclose(_never_seen(other, step, batches[2]), expected, rtol=1e-6)


@pytest.mark.parametrize(
  "options", [StepOptions(num_micro_batches=3), StepOptions(compiled="step")]
)
def test_gradient_cache_and_compilation_do_not_change_the_results(options):
  wanted = parity.expected(_make_step, _batches(), 1)
  found = parity.expected(lambda: _make_step(options=options), _batches(), 1)
  errors = parity.errors(found, wanted)
  assert parity.is_equal(errors), parity.table([("centres", errors)])
