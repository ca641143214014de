"""Cross-batch memory: its entries, their use in losses, and equality of replicas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

import trainer.gin_registrations  # noqa: F401  Registers parts of run files.
from tests.distribute.parity_test import LOSSES, _batches, _maker
from tests.losses.table import ROWS
from tests.thorough import thorough_except
from trainer.config import run_config
from trainer.data.pipeline import PADDING_LABEL, PADDING_RECORD, Batch
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses.composite_losses import JitteredLoss
from trainer.losses.cross_batch_memory import (
  CrossBatchMemory,
  Entries,
)
from trainer.losses.distances import euclidean
from trainer.losses.loss_terms import Anchors, Candidates
from trainer.losses.metric_accumulators import summarize
from trainer.losses.objectives import MiningBatch, WithinGroups
from trainer.tpu_check import replica_program
from trainer.training import parity
from trainer.training.checkpoint import Checkpoints, TrainingState

_RUN_FILE = "configs/runs/glyphs_cross_batch_memory.gin"
_SIZE, _WARM_UP, _BATCH = 11, 1, 6
_NUM_STEPS, _NUM_RECORDS, _NUM_DIMENSIONS = 4, 14, 5


def _cross_batch_memory(size=_SIZE, warm_up_steps=_WARM_UP):
  bank = CrossBatchMemory(size=size, warm_up_steps=warm_up_steps)
  bank.create_variables(_NUM_DIMENSIONS)
  return bank


def _steps():
  """Yields embeddings, labels, record numbers and validity of each step's examples."""
  rng = np.random.default_rng(5)
  classes = rng.integers(0, 4, _NUM_RECORDS)
  for step in range(_NUM_STEPS):
    numbers = rng.permutation(_NUM_RECORDS)[:_BATCH]
    numbers[1] = numbers[0]  # A record may be drawn twice.
    embeddings = rng.normal(size=(_BATCH, _NUM_DIMENSIONS)).astype(np.float32)
    is_real = np.ones(_BATCH, bool)
    is_real[-1] = step != 1
    yield (
      embeddings,
      np.where(is_real, classes[numbers], PADDING_LABEL).astype(np.int32),
      np.where(is_real, numbers, PADDING_RECORD).astype(np.int32),
      is_real,
    )


def _evaluate_with_memory(loss, bank, step, embeddings, labels, numbers, is_real):
  """Returns loss terms and gradient with the memory, and the new entries."""
  added = []

  def loss_with_memory(anchors, candidates):
    extended = bank.extend(
      MiningBatch(anchors, candidates, is_global=True),
      tf.constant(numbers),
      tf.constant(step),
      OneReplica(),
    )
    added.append(extended.new_entries)
    output = loss(anchors, extended.candidates)
    return output._replace(statistics={**output.statistics, **extended.statistics})

  return *_evaluate(loss_with_memory, embeddings, labels, is_real), added[0]


def _evaluate(loss, embeddings, labels, is_real, num_anchors=None):
  """Returns the loss of the first examples against all, and its gradient to them."""
  weights = is_real.astype(np.float32)[:num_anchors]
  fresh = tf.constant(embeddings[:num_anchors])
  with tf.GradientTape() as tape:
    tape.watch(fresh)
    terms = loss(
      Anchors(fresh, tf.constant(labels[:num_anchors]), tf.constant(weights)),
      Candidates(
        tf.concat([fresh, embeddings[len(fresh) :]], 0),
        tf.constant(labels),
        tf.constant(is_real),
        tf.range(len(fresh)),
      ),
    )
  gradient = tape.gradient(terms.total, fresh, unconnected_gradients="zero")
  return terms, gradient.numpy()


class _ReferenceMemory:
  """The memory by its definition: a list that keeps the newest entries."""

  def __init__(self):
    self.entries = []

  def others(self, step, numbers):
    """Returns entries that are no copies; none before the warmup ends."""
    if step < _WARM_UP:
      return []
    return [each for each in self.entries if each and each[2] not in numbers]

  def add(self, step, *rows):
    new = [(*row[:3], step) if row[3] else None for row in zip(*rows)]
    self.entries = (new + self.entries)[:_SIZE]

  def metrics(self, step, embeddings, numbers, is_real):
    there = [each for each in self.entries if each]
    metrics = {"bank/fill": len(there) / _SIZE}
    if there:
      metrics["bank/age_steps"] = np.mean([step - each[3] for each in there])
    moves = []
    for embedding, number in zip(embeddings[is_real], numbers[is_real]):
      copies = [each[0] for each in there if each[2] == number]
      moves += [np.linalg.norm(embedding - copy) for copy in copies[:1]]
    if moves:
      metrics["bank/drift"] = np.mean(moves)
    return metrics


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_loss_compares_the_batch_with_batch_and_memory(row):
  bank, memory = _cross_batch_memory(), _ReferenceMemory()
  for step, rows in enumerate(_steps()):
    embeddings, labels, numbers, is_real = rows
    terms, gradient, added = _evaluate_with_memory(row.make(), bank, step, *rows)
    others = memory.others(step, numbers)
    whole = (
      np.stack([*embeddings, *(each[0] for each in others)]),
      np.array([*labels, *(each[1] for each in others)], np.int32),
      np.r_[is_real, np.ones(len(others), bool)],
    )
    expected, slope = _evaluate(row.make(), *whole, num_anchors=_BATCH)
    got = (terms.total, terms.count, gradient)
    for value, wanted in zip(got, (expected.total, expected.count, slope)):
      np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    metrics = {
      name: value
      for name, value in summarize(terms.statistics).items()
      if name.startswith("bank/")
    }
    assert metrics == pytest.approx(memory.metrics(step, embeddings, numbers, is_real))
    bank.add(added)
    memory.add(step, *rows)
    assert len(others) > 0 or step == 0


def test_jitter_changes_the_batch_but_not_the_memory():
  seen = []

  def remember(anchors, candidates):
    seen.append(candidates)
    return ROWS[0].make()(anchors, candidates)

  remember.comparison, remember.margin = euclidean, None
  bank, first, second = (
    _cross_batch_memory(warm_up_steps=0),
    *itertools.islice(_steps(), 2),
  )
  jittered = JitteredLoss(loss=remember, scale=0.1)
  for step, rows in enumerate((first, second)):
    *_, added = _evaluate_with_memory(jittered, bank, step, *rows)
    np.testing.assert_array_equal(added.embeddings, rows[0])
    bank.add(added)
  moves = np.linalg.norm(seen[1].embeddings - second[0], axis=1)
  assert (moves > 0.01).all() and (moves < 0.3).all()
  np.testing.assert_array_equal(seen[1].fixed_embeddings[:_BATCH], first[0])


@pytest.mark.parametrize("size", [1, 4, 9, 40])
def test_memory_keeps_the_newest_entries_in_order(size):
  bank, numbers = _cross_batch_memory(size), []
  for batch in np.split(np.arange(30, dtype=np.int32), [5, 10, 15, 20, 25]):
    embeddings = np.tile(batch[:, None].astype(np.float32), (1, _NUM_DIMENSIONS))
    bank.add(Entries(embeddings, batch, batch, batch))
    numbers = [*batch, *numbers]
    expected = (numbers + [-1] * size)[:size]
    for values in (bank.entries.record_numbers, bank.entries.steps):
      np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(
      bank.entries.embeddings[:, 0], np.maximum(expected, 0)
    )


_PARITY = [
  ("gathered", 1, 2),
  ("gathered", 2, 1),
  ("gathered", 4, 1),
  ("alone", 2, 3),
  ("alone", 4, 1),
]


def _step_maker(objective, cross_batch_memory, **options):
  def make_step():
    bank = CrossBatchMemory(size=40, warm_up_steps=1) if cross_batch_memory else None
    return _maker(
      LOSSES["InfoNCELoss-learned"],
      objective,
      "sgd",
      mining_statistics=None,
      cross_batch_memory=bank,
      **options,
    )()

  return make_step


@pytest.mark.parity
@pytest.mark.parametrize(
  ("objective", "num_replicas", "num_micro_batches"),
  thorough_except([("gathered", 2, 1), ("alone", 2, 3)], _PARITY),
)
def test_replicas_with_a_memory_train_like_one(
  mirrored, objective, num_replicas, num_micro_batches
):
  batches = _batches(4)
  wanted = parity.expected(_step_maker(objective, True), batches, num_replicas)
  make_step = _step_maker(objective, True, num_micro_batches=num_micro_batches)
  got = parity.trained(mirrored(num_replicas), make_step, batches)
  found = parity.errors(got, wanted)
  assert parity.is_equal(found), parity.table([(objective, found)])


def test_compiled_step_with_a_memory_equals_the_uncompiled_one():
  wanted = parity.expected(_step_maker("gathered", True), _batches(4), 1)
  make_step = _step_maker("gathered", True, compiled="step")
  found = parity.errors(parity.expected(make_step, _batches(4), 1), wanted)
  assert parity.is_equal(found), parity.table([("compiled", found)])


def test_memory_changes_the_loss_after_warmup():
  with_bank, without = (
    parity.expected(_step_maker("gathered", is_there), _batches(4), 1)
    for is_there in (True, False)
  )
  assert with_bank.loss[0] == without.loss[0]
  assert all(np.abs(np.subtract(with_bank.loss, without.loss))[1:] > 1e-3)


def test_memory_has_the_order_of_the_global_batch_on_all_replicas(mirrored):
  strategy, batches = mirrored(2), _batches(3)
  made = []

  def make_step():
    made.append(_step_maker("alone", True)())
    return made[-1]

  parity.trained(strategy, make_step, batches)
  bank = made[0].cross_batch_memory
  newest_first = np.concatenate([each.record_numbers for each in batches[::-1]])[:40]
  for value in strategy.experimental_local_results(bank.contents["record_numbers"]):
    np.testing.assert_array_equal(value, newest_first)
  one, other = strategy.experimental_local_results(bank.contents["embeddings"])
  np.testing.assert_array_equal(one, other)


def _checkpoints(step, folder):
  checkpoints = Checkpoints(
    model_dir=str(folder),
    encoder=step.encoder,
    training=TrainingState(
      step.optimizer, step.loss, cross_batch_memory=step.cross_batch_memory
    ),
  )
  return checkpoints


def test_memory_of_two_replicas_is_restored_on_one(mirrored, tmp_path):
  made = []

  def make_step():
    made.append(_step_maker("gathered", True)())
    return made[-1]

  with mirrored(2).scope():
    parity.trained(mirrored(2), make_step, _batches(2))
    saved = _checkpoints(made[0], tmp_path)
    saved.save(2)
    saved.wait()
  restored = make_step()
  assert _checkpoints(restored, tmp_path).restore() == 2
  for field, value in restored.cross_batch_memory.contents.items():
    np.testing.assert_array_equal(value, made[0].cross_batch_memory.contents[field])


@pytest.mark.parametrize(
  ("saved", "restored", "message"),
  [
    (None, 7, "its memory has no entries, and .* has 7 entries of 6"),
    (9, None, "its memory has 9 entries of 6, and .* has no entries"),
    (9, 7, "its memory has 9 entries of 6, and .* has 7 entries of 6"),
  ],
)
def test_checkpoint_with_a_different_memory_is_refused_with_the_difference(
  tmp_path, saved, restored, message
):
  def checkpoints(size):
    step = _step_maker("gathered", False)()
    step.cross_batch_memory = size and _cross_batch_memory(size)
    if size:
      step.cross_batch_memory.create_variables(6)
    return _checkpoints(step, tmp_path)

  first = checkpoints(saved)
  first.save(1)
  first.wait()
  with pytest.raises(UserError, match=message):
    checkpoints(restored).restore()


def test_run_file_with_a_memory_trains():
  small = [
    "BANK_SIZE = 9",
    "ConvNet.filters = (2,)",
    "PKSampler.classes_per_batch = 2",
    "TrainStep.mining_statistics = None",
  ]
  run_config.load([_RUN_FILE], small, needed=("train",))
  run = replica_program.build_run_step(1)
  specs = run.replica_batch(run.num_classes, 1)
  inputs = tf.random.stateless_uniform(specs.inputs.shape, (1, 2))
  labels = tf.repeat(tf.range(2), run.num_samples)
  batch = Batch(inputs, labels, tf.ones([8]), tf.range(8))
  for _ in range(2):
    metrics = summarize(run.step(batch, OneReplica()))
  assert metrics["bank/fill"] == pytest.approx(8 / 9)
  assert metrics["bank/age_steps"] == 1
  assert 0 < metrics["bank/drift"] < 2


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_invalid_sizes_are_refused(numbers):
  size, warm_up_steps = numbers
  with pytest.raises(UserError, match="must be at least"):
    CrossBatchMemory(size=size, warm_up_steps=warm_up_steps)


def test_objective_with_given_relevance_is_refused():
  embeddings, labels, numbers, is_real = next(_steps())
  anchors = Anchors(embeddings, labels, is_real.astype(np.float32))
  pairs = WithinGroups()(anchors, OneReplica())
  with pytest.raises(UserError, match="by labels, and WithinGroups by groups"):
    _cross_batch_memory().extend(
      pairs, tf.constant(numbers), tf.constant(0), OneReplica()
    )


def test_several_labels_of_an_example_are_refused():
  several = np.ones((_BATCH, 3), bool)
  embeddings, _, numbers, is_real = next(_steps())
  with pytest.raises(UserError, match="keeps one label of an example"):
    _evaluate_with_memory(
      ROWS[0].make(), _cross_batch_memory(), 0, embeddings, several, numbers, is_real
    )
