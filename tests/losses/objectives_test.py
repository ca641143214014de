"""Comparison within groups, on any number of replicas."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.pipeline import PADDING_LABEL, Batch
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  InfoNCELoss,
)
from trainer.losses.loss_terms import Anchors
from trainer.losses.objectives import WithinGroups
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import parity
from trainer.training.step import TrainStep

_MARGIN = 0.5


def _embeddings(num_rows):
  return np.random.default_rng(1).normal(size=(num_rows, 4)).astype(np.float32)


def _loss_of(loss, objective, embeddings, weights=None):
  """Returns the loss with equal labels, so that only the groups matter."""
  num_rows = len(embeddings)
  weights = np.ones(num_rows, np.float32) if weights is None else weights
  anchors = Anchors(
    tf.constant(embeddings), tf.zeros(num_rows, tf.int32), tf.constant(weights)
  )
  pairs = objective(anchors, OneReplica())
  output = loss(pairs.anchors, pairs.candidates)
  return pairs.replica_loss(output, OneReplica()).value.numpy()


def _hinges(embeddings, num_positives, num_negatives):
  """Returns max(d_ap − d_an + margin, 0) per triplet, in one list per group."""
  groups = embeddings.reshape(-1, 1 + num_positives + num_negatives, 4)
  for anchor, *others in np.float64(groups):
    distances = [np.linalg.norm(anchor - other) for other in others]
    yield [
      max(positive - negative + _MARGIN, 0.0)
      for positive in distances[:num_positives]
      for negative in distances[num_positives:]
    ]


@pytest.mark.parametrize(("num_positives", "num_negatives"), [(1, 1), (2, 3)])
def test_batch_all_is_the_mean_over_active_triplets_of_the_groups(
  num_positives, num_negatives
):
  embeddings = _embeddings(6 * (1 + num_positives + num_negatives))
  objective = WithinGroups(num_positives=num_positives, num_negatives=num_negatives)
  got = _loss_of(BatchAllTripletLoss(margin=_MARGIN), objective, embeddings)
  terms = np.concatenate(list(_hinges(embeddings, num_positives, num_negatives)))
  np.testing.assert_allclose(got, terms[terms > 0].mean(), rtol=1e-5)


def test_batch_hard_uses_the_hardest_triplet_per_group():
  embeddings = _embeddings(36)
  objective = WithinGroups(num_positives=2, num_negatives=3)
  got = _loss_of(BatchHardTripletLoss(margin=_MARGIN), objective, embeddings)
  hardest = [max(terms) for terms in _hinges(embeddings, 2, 3)]
  np.testing.assert_allclose(got, np.mean(hardest), rtol=1e-5)


def test_group_of_padding_does_not_change_the_loss():
  embeddings, loss = _embeddings(9), BatchAllTripletLoss(margin=_MARGIN)
  padded = np.concatenate([embeddings, np.full((3, 4), np.nan, np.float32)])
  weights = np.repeat(np.float32([1, 0]), [9, 3])
  wanted = _loss_of(loss, WithinGroups(), embeddings)
  assert _loss_of(loss, WithinGroups(), padded, weights) == pytest.approx(wanted)


def _batches():
  rng = np.random.default_rng(2)
  labels = np.arange(24, dtype=np.int32) // 2
  labels[-3:] = PADDING_LABEL
  weights = (labels != PADDING_LABEL).astype(np.float32)
  return [
    Batch(
      rng.normal(size=(24, 5)).astype(np.float32),
      labels,
      weights,
      np.arange(24, dtype=np.int32),
    )
    for _ in range(2)
  ]


def _step(make_loss):
  tf.keras.utils.set_random_seed(1)
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=()), embedding_size=4),
    loss=make_loss(),
    objective_fn=WithinGroups(),
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
  )
  step.create_variables((5,))
  return step


_LOSSES = {
  "batch_all": functools.partial(BatchAllTripletLoss, margin=_MARGIN),
  "info_nce": functools.partial(InfoNCELoss, temperature=0.5),
}


@pytest.mark.parity
@pytest.mark.parametrize(("loss", "num_replicas"), [("batch_all", 2), ("info_nce", 4)])
def test_replicas_compute_the_results_of_one_replica(mirrored, loss, num_replicas):
  make_step = functools.partial(_step, _LOSSES[loss])
  wanted = parity.expected(make_step, _batches(), num_replicas)
  found = parity.errors(
    parity.trained(mirrored(num_replicas), make_step, _batches()), wanted
  )
  assert parity.is_equal(found), parity.table([("within groups", found)])


@pytest.mark.parametrize(
  ("group", "message"),
  [(None, "draws classes"), ((1, 6), "1 positives and 2 negatives .* have 1 and 6")],
)
def test_samplers_with_other_groups_are_refused(group, message):
  with pytest.raises(UserError, match=message):
    WithinGroups(num_negatives=2).check_groups(group, "train.sampler_fn")


def test_a_group_without_positives_or_negatives_is_refused():
  with pytest.raises(UserError, match="at least 1"):
    WithinGroups(num_negatives=0)
