"""Properties of every loss, for each row of the table."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, definition, oracles
from tests.losses.table import ROWS, each_loss, each_loss_class
from trainer import losses
from trainer.losses.tiled_loss import TiledPairLoss


def _are_same(one, other, tolerance=1e-5):
  """Returns whether total, count and gradient agree, relative to their maxima."""
  pairs = [(np.asarray(value), np.asarray(wanted)) for value, wanted in zip(one, other)]
  return all(
    np.allclose(value, wanted, rtol=0, atol=tolerance * np.abs(wanted).max() + 1e-6)
    for value, wanted in pairs
  )


def _related(name="unbalanced"):
  """Returns embeddings, labels and which examples share a label."""
  embeddings, labels = batches.random_batch(name)
  return embeddings, labels, np.array(oracles.relevance(labels))


def test_table_has_every_public_loss():
  public = {
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), TiledPairLoss)
  }
  assert public == {type(row.make()).__name__ for row in ROWS}


@each_loss
@pytest.mark.parametrize("batch", batches.LABELS)
def test_total_and_count_equal_the_definition(row, batch):
  embeddings, labels, related = _related(batch)
  total, count, gradient = batches.evaluate(row.make(), embeddings, labels)
  expected = definition.total_and_count(row, embeddings, related)
  np.testing.assert_allclose((total, count), expected, rtol=2e-5, atol=2e-5)
  assert np.isfinite(gradient).all()


@each_loss
def test_gradient_equals_finite_differences_of_the_definition(row):
  embeddings, labels, related = _related()
  _, _, gradient = batches.evaluate(row.make(), embeddings, labels)
  assert _are_same([gradient], [definition.gradient(row, embeddings, related)], 1e-4)


@each_loss_class
def test_compiled_large_batch_equals_the_sum_of_its_parts(row):
  random = np.random.default_rng(4)
  embeddings = random.normal(size=(260, 5)).astype(np.float32)
  labels = random.integers(0, 60, 260).astype(np.int32)
  loss = row.make()
  whole = batches.evaluate(loss, embeddings, labels)
  assert loss._compiled_fn.experimental_get_tracing_count() > 0
  parts = [
    batches.evaluate(loss, embeddings, labels, rows=rows)
    for rows in np.split(np.arange(260), 2)
  ]
  assert _are_same([sum(values) for values in zip(*parts)], whole)


@each_loss
def test_loss_of_several_labels_per_example_equals_the_definition(row):
  embeddings, _ = batches.random_batch("unbalanced")
  several = np.random.default_rng(3).random((12, 8)) < 0.2
  assert _is_as_defined(row, embeddings, several, np.array(oracles.relevance(several)))


@each_loss
def test_loss_of_given_relevance_equals_the_definition(row):
  embeddings, labels = batches.random_batch("unbalanced")
  given = np.random.default_rng(4).random((12, 12)) < 0.3
  assert _is_as_defined(row, embeddings, labels, given, is_relevant=given)


@each_loss
def test_excluded_pairs_do_not_change_the_loss(row):
  embeddings, labels = batches.random_batch("unbalanced")
  groups = np.arange(12) // 4
  apart = groups[:, None] == groups[None, :]
  for loss in (row.make(), row.make(rows_per_tile=5)):
    whole = batches.evaluate(loss, embeddings, labels, is_compared=apart)
    parts = [
      batches.evaluate(loss, embeddings[groups == g], labels[groups == g])
      for g in range(3)
    ]
    *sums, gradients = zip(*parts)
    assert _are_same(whole, (*map(sum, sums), np.concatenate(gradients)))


def _is_as_defined(row, embeddings, labels, related, **options):
  """Checks value and gradient, whole and tiled, with weights and padding."""
  weights = np.linspace(0.5, 2, 12).astype(np.float32)
  weights[[2, 9]] = 0
  expected = definition.total_and_count(row, embeddings, related, weights)
  slopes = definition.gradient(row, embeddings, related, weights)
  for loss in (row.make(), row.make(rows_per_tile=5)):
    *values, gradient = batches.evaluate(loss, embeddings, labels, weights, **options)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-5)
    if not _are_same([gradient], [slopes], 1e-4):
      return False
  return True


@each_loss
def test_slices_of_the_anchors_add_up_to_the_whole(row):
  embeddings, labels = batches.random_batch("unbalanced")
  whole = batches.evaluate(row.make(), embeddings, labels)
  parts = [
    batches.evaluate(row.make(), embeddings, labels, rows=rows)
    for rows in ([7, 0, 3, 9], [4, 11, 2, 6], [10, 5, 8, 1])
  ]
  assert _are_same([sum(values) for values in zip(*parts)], whole)


@each_loss
def test_tiles_add_up_to_the_whole(row):
  embeddings, labels = batches.random_batch("unbalanced")
  whole = batches.evaluate(row.make(), embeddings, labels)
  assert _are_same(
    batches.evaluate(row.make(rows_per_tile=5), embeddings, labels), whole
  )


@each_loss
@pytest.mark.parametrize("rows_per_tile", [None, 3])
def test_fixed_candidates_are_candidates_without_a_gradient(row, rows_per_tile):
  embeddings, labels = batches.random_batch("unbalanced")
  weights = np.ones(len(labels), np.float32)
  weights[[2, 9]] = 0  # One in the batch, one among the fixed candidates.
  num_fresh = 7
  whole = row.make(), embeddings, labels, weights, range(num_fresh)
  *expected, gradient = batches.evaluate(*whole)
  anchors, candidates = batches.arguments(*whole[1:])
  fresh = tf.convert_to_tensor(embeddings[:num_fresh])
  with tf.GradientTape() as tape:
    tape.watch(fresh)
    terms = row.make(rows_per_tile=rows_per_tile)(
      anchors._replace(embeddings=fresh),
      candidates._replace(
        embeddings=fresh, fixed_embeddings=tf.constant(embeddings[num_fresh:])
      ),
    )
  got = terms.total, terms.count, tape.gradient(terms.total, fresh)
  assert _are_same(got, (*expected, gradient[:num_fresh]))


@each_loss
def test_statistics_of_tiles_add_up_to_those_of_the_whole(row):
  arguments = batches.arguments(*batches.random_batch("unbalanced"))
  whole = row.make()(*arguments).statistics
  tiles = row.make(rows_per_tile=5)(*arguments).statistics
  np.testing.assert_allclose(
    tf.nest.flatten(dict(tiles)), tf.nest.flatten(dict(whole)), rtol=1e-5
  )


@each_loss
def test_padding_rows_do_not_change_the_loss(row):
  embeddings, labels = batches.random_batch("unbalanced")
  weights = np.r_[np.ones(5), np.zeros(7)].astype(np.float32)
  total, count, gradient = batches.evaluate(row.make(), embeddings, labels, weights)
  whole = batches.evaluate(row.make(), embeddings[:5], labels[:5])
  assert _are_same((total, count, gradient[:5]), whole)
  assert not gradient[5:].any()


@each_loss
@pytest.mark.parametrize("rows_per_tile", [None, 4])
def test_padding_may_contain_any_values(row, rows_per_tile):
  embeddings, labels = batches.random_batch("unbalanced")
  weights = np.ones(len(labels), np.float32)
  weights[[2, 7]] = 0
  loss = row.make(rows_per_tile=rows_per_tile)
  expected = batches.evaluate(loss, embeddings, labels, weights)
  embeddings = embeddings.copy()
  embeddings[2], embeddings[7] = np.nan, np.inf
  assert _are_same(batches.evaluate(loss, embeddings, labels, weights), expected)


@each_loss
def test_zero_embedding_has_a_bounded_gradient(row):
  embeddings, labels = batches.random_batch("unbalanced")
  _, _, ordinary = batches.evaluate(row.make(), embeddings, labels)
  embeddings = embeddings.copy()
  embeddings[3] = 0
  _, _, gradient = batches.evaluate(row.make(), embeddings, labels)
  assert np.abs(gradient).max() < 20 * np.abs(ordinary).max()


@each_loss
def test_terms_have_the_weight_of_their_anchor(row):
  embeddings, labels, related = _related()
  weights = np.linspace(0.5, 2, len(labels)).astype(np.float32)
  total, count, _ = batches.evaluate(row.make(), embeddings, labels, weights)
  expected = definition.total_and_count(row, embeddings, related, weights)
  np.testing.assert_allclose((total, count), expected, rtol=2e-5)


@each_loss
def test_order_of_the_batch_does_not_matter(row):
  embeddings, labels = batches.random_batch("unbalanced")
  order = np.random.default_rng(0).permutation(len(labels))
  total, count, gradient = batches.evaluate(row.make(), embeddings, labels)
  permuted = batches.evaluate(row.make(), embeddings[order], labels[order])
  assert _are_same(permuted, (total, count, gradient[order]))


@each_loss
@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
def test_duplicates_have_finite_gradients(row, norm):
  embeddings, labels = batches.random_batch("unbalanced")
  embeddings[[0, 1, 2]] = embeddings[3]
  total, _, gradient = batches.evaluate(row.make(), norm * embeddings, labels)
  assert np.isfinite(total)
  assert np.isfinite(gradient).all()


@each_loss
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_collapsed_batch_has_finite_gradients(row, value):
  embeddings, labels = batches.random_batch("unbalanced")
  embeddings = np.full_like(embeddings, value)
  total, _, gradient = batches.evaluate(row.make(), embeddings, labels)
  assert np.isfinite(total)
  assert np.isfinite(gradient).all()


@each_loss
def test_loss_of_a_batch_of_padding_is_zero(row):
  embeddings, labels = batches.random_batch("balanced")
  weights = np.zeros(len(labels), np.float32)
  total, count, gradient = batches.evaluate(row.make(), embeddings, labels, weights)
  assert (total, count) == (0, 0)
  assert not gradient.any()


@each_loss
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_embeddings_are_mined_in_float32(row, dtype):
  embeddings, labels = batches.random_batch("unbalanced")
  halves = tf.cast(embeddings, dtype)
  rounded = tf.cast(halves, tf.float32)
  half = batches.evaluate(row.make(), halves, labels)
  assert _are_same(half, batches.evaluate(row.make(), rounded, labels), 2e-2)
  np.testing.assert_equal(half[:2], batches.evaluate(row.make(), rounded, labels)[:2])


@each_loss
def test_loss_compiled_by_xla_is_the_same(row):
  embeddings, labels = batches.random_batch("unbalanced")
  loss = row.make()
  anchors, candidates = batches.arguments(embeddings, labels)

  @tf.function(jit_compile=True)
  def compiled(embeddings):
    with tf.GradientTape() as tape:
      tape.watch(embeddings)
      terms = loss(
        anchors._replace(embeddings=embeddings),
        candidates._replace(embeddings=embeddings),
      )
    return terms.total, terms.count, tape.gradient(terms.total, embeddings)

  assert _are_same(compiled(embeddings), batches.evaluate(loss, embeddings, labels))


@each_loss
def test_active_fraction_equals_the_definition(row):
  embeddings, labels, related = _related()
  terms = row.make()(*batches.arguments(embeddings, labels))
  active = terms.statistics["mining/active_fraction"]
  sums = definition.sums(row, np.float64(embeddings), related)
  np.testing.assert_allclose((active.total, active.count), sums[1:], rtol=1e-5)
