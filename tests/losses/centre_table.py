"""Every loss against class centres with its oracle, and evaluation of both."""

from __future__ import annotations

import dataclasses
from typing import Callable

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import centre_oracles as oracles
from trainer import losses
from trainer.distribute.collectives import OneReplica
from trainer.losses.centre_losses import ArcOptions
from trainer.losses.centre_products import ClassFilter
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.losses.loss_terms import Anchors
from trainer.losses.objectives import global_negatives
from trainer.training.row_optimizers import RowSGD

SIZES = [1, 40, 3, 1000, 8]


@dataclasses.dataclass(frozen=True)
class Row:
  """A loss and its definition.

  Attributes:
    name: of the test.
    make: the loss, from the class centres.
    oracle: of `tests.losses.centre_oracles`.
    centres_per_class: k.
  """

  name: str
  make: Callable
  oracle: Callable
  centres_per_class: int


class CentreBatch:
  """A mutable batch and centres; C = 5 classes with k centres each, D = 3."""

  def __init__(self, centres_per_class=1, num_classes=5):
    random = np.random.default_rng(num_classes)
    self.embeddings = random.normal(size=(6, 3)).astype(np.float32)
    shape = (num_classes, centres_per_class, 3)
    self.centres = random.normal(size=shape).astype(np.float32)
    # An example nearly opposite to all centres of its class.
    self.centres[0] = self.centres[0, :1] + 0.1 * self.centres[0]
    self.embeddings[1] = 0.1 * self.embeddings[1] - self.centres[0, 0]
    # A class with one example, and empty classes.
    self.labels = np.array([1, 0, 1, 3 % num_classes, 1, 1], np.int32)
    self.weights = np.array([1, 0.5, 1, 2, 1.5, 1], np.float32)


def class_centres(num_classes, num_dimensions, centres_per_class=1, **arguments):
  """Returns a table on this device; `evaluate` assigns its values."""
  optimizer = RowSGD(learning_rate=0.1)
  table = ClassCentres(
    optimizer=optimizer, centres_per_class=centres_per_class, **arguments
  )
  sizes = np.resize(SIZES, num_classes)
  table.create_variables(num_dimensions, TrainingClasses(range(num_classes), sizes))
  return table


def evaluate(make, batch):
  """Returns value and gradients to embeddings and centres, as float32 arrays."""
  num_classes, centres_per_class, num_dimensions = batch.centres.shape
  table = class_centres(num_classes, num_dimensions, centres_per_class)
  loss = make(table)
  embeddings = tf.convert_to_tensor(batch.embeddings)
  rows = table.read(tf.constant(batch.labels), tf.constant(0), OneReplica())
  flat = batch.centres.reshape(-1, num_dimensions)
  missing = rows.vectors.shape[0] - len(flat)
  vectors = tf.constant(np.pad(flat, [[0, missing], [0, 0]]))
  with tf.GradientTape() as tape:
    tape.watch([embeddings, vectors])
    anchors = Anchors(embeddings, tf.constant(batch.labels), tf.constant(batch.weights))
    pairs = global_negatives(anchors, OneReplica())
    rows = rows._replace(vectors=vectors)
    value = loss.replica_loss(pairs, [rows], OneReplica()).value
  to_embeddings, to_vectors = tape.gradient(value, [embeddings, vectors])
  assert not np.any(to_vectors[len(flat) :])
  to_centres = to_vectors.numpy()[: len(flat)].reshape(batch.centres.shape)
  return value.numpy(), tf.cast(to_embeddings, tf.float32).numpy(), to_centres


def expected_value(oracle, batch, embeddings=None, centres=None):
  """Returns the value of the oracle; stopped gradients keep the batch's values."""
  at = np.float64(batch.embeddings), np.float64(batch.centres)
  embeddings = at[0] if embeddings is None else embeddings
  centres = at[1] if centres is None else centres
  return oracle(embeddings, centres, batch.labels, np.float64(batch.weights), at)


def expected_gradients(oracle, batch, step=1e-6):
  """Returns central differences of the oracle by embeddings and centres."""
  points = [np.float64(batch.embeddings), np.float64(batch.centres)]
  gradients = []
  for number, point in enumerate(points):
    gradient = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
      ends = []
      for sign in (1, -1):
        moved = [each.copy() for each in points]
        moved[number][index] += sign * step
        ends.append(expected_value(oracle, batch, *moved))
      gradient[index] = (ends[0] - ends[1]) / (2 * step)
    gradients.append(gradient)
  return gradients


def _text(value):
  return str(value) if isinstance(value, (str, float)) else type(value).__name__


def _row(loss_class, oracle, /, *, centres_per_class=1, **arguments):
  name = "-".join(
    [loss_class.__name__, *map(_text, arguments.values())]
    + ([f"k={centres_per_class}"] if centres_per_class > 1 else [])
  )
  return Row(
    name,
    lambda centres: loss_class(centres=centres, **arguments),
    oracle,
    centres_per_class,
  )


def _arc_rows():
  """Returns rows of ArcFace: each treatment of angles near π, and each gradient."""
  for beyond_pi in ("linear", "none", "easy"):
    for gradient in ("exact", "straight_through"):
      own = oracles.angle_margin(
        0.6, beyond_pi=beyond_pi, is_straight_through=gradient == "straight_through"
      )
      yield _row(
        losses.ArcFaceLoss,
        oracles.softmax(own, 8.0),
        margin=0.6,
        scale=8.0,
        arc=ArcOptions(beyond_pi, gradient),
      )


ROWS = [
  _row(losses.NormFaceLoss, oracles.softmax(oracles.plain, 9.0), scale=9.0),
  _row(
    losses.NormFaceLoss,
    oracles.softmax(oracles.plain, 9.0),
    scale=9.0,
    centres_per_class=3,
  ),
  _row(
    losses.NormFaceLoss,
    oracles.softmax(oracles.plain, 9.0, ignored_above=0.3),
    scale=9.0,
    class_filter=ClassFilter(0.3),
    centres_per_class=2,
  ),
  _row(
    losses.CosFaceLoss,
    oracles.softmax(oracles.cosine_margin(0.35), 64.0),
  ),
  _row(
    losses.CosFaceLoss,
    oracles.softmax(oracles.cosine_margin(0.2), 8.0, ignored_above=0.3),
    margin=0.2,
    scale=8.0,
    class_filter=ClassFilter(0.3),
  ),
  *_arc_rows(),
  _row(losses.ArcFaceLoss, oracles.softmax(oracles.angle_margin(0.5), 64.0)),
  _row(
    losses.ArcFaceLoss,
    oracles.softmax(oracles.angle_margin(0.5), 8.0, ignored_above=0.4),
    scale=8.0,
    class_filter=ClassFilter(0.4),
    centres_per_class=3,
  ),
  _row(
    losses.CombinedMarginLoss,
    oracles.softmax(oracles.angle_margin(0.3, m1=1.2, m3=0.1), 8.0),
    angle_factor=1.2,
    angle_margin=0.3,
    cosine_margin=0.1,
    scale=8.0,
  ),
  _row(
    losses.CombinedMarginLoss,
    oracles.softmax(
      oracles.angle_margin(0.3, m3=0.1, beyond_pi="none", is_straight_through=True), 8.0
    ),
    angle_margin=0.3,
    cosine_margin=0.1,
    scale=8.0,
    arc=ArcOptions("none", "straight_through"),
    centres_per_class=2,
  ),
  _row(
    losses.insightface_combined,
    oracles.softmax(
      oracles.angle_margin(0.5, beyond_pi="none", is_straight_through=True),
      8.0,
      ignored_above=0.2,
      is_ignored_zero=True,
    ),
    scale=8.0,
    ignored_above=0.2,
  ),
  _row(
    losses.insightface_combined,
    oracles.softmax(oracles.cosine_margin(0.4), 64.0),
    angle_margin=0.0,
    cosine_margin=0.4,
    centres_per_class=3,
  ),
  _row(
    losses.insightface_arcface,
    oracles.softmax(
      oracles.angle_margin(0.5, beyond_pi="none", is_straight_through=True), 64.0
    ),
  ),
  _row(losses.insightface_cosface, oracles.softmax(oracles.cosine_margin(0.4), 64.0)),
  _row(losses.proxy_nca_plus_plus, oracles.softmax(oracles.plain, 18.0)),
  _row(losses.AdaFaceLoss, oracles.ada_face(0.4, 0.333, 64.0, 0.01)),
  _row(
    losses.AdaFaceLoss,
    oracles.ada_face(0.3, 0.5, 8.0, 1.0),
    margin=0.3,
    concentration=0.5,
    scale=8.0,
    update_rate=1.0,
    centres_per_class=2,
  ),
  _row(
    losses.DynamicMarginLoss,
    oracles.softmax(
      oracles.angle_margin(oracles.size_margin(SIZES, 0.45, 0.25, 0.05)), 64.0
    ),
    centres_per_class=3,
  ),
  _row(
    losses.DynamicMarginLoss,
    oracles.softmax(
      oracles.angle_margin(
        oracles.size_margin(SIZES, 0.8, 0.5, 0.1), is_straight_through=True
      ),
      8.0,
    ),
    factor=0.8,
    power=0.5,
    offset=0.1,
    scale=8.0,
    arc=ArcOptions(gradient="straight_through"),
  ),
  _row(
    losses.SoftTripleLoss,
    oracles.soft_triple(0.01, 20.0, 0.1, 0.2),
    centres_per_class=3,
  ),
  _row(
    losses.SoftTripleLoss,
    oracles.soft_triple(0.1, 8.0, 0.3, 1.0),
    margin=0.1,
    scale=8.0,
    softness=0.3,
    regularization=1.0,
    centres_per_class=2,
  ),
  _row(losses.SoftTripleLoss, oracles.soft_triple(0.01, 20.0, 0.1, 0.2)),
  _row(losses.ProxyAnchorLoss, oracles.proxy_anchor(32.0, 0.1)),
  _row(losses.ProxyAnchorLoss, oracles.proxy_anchor(4.0, 0.3), margin=0.3, scale=4.0),
]


def _first_of_each_kind():
  """Returns one row per loss, and one with several centres per class."""
  table = class_centres(5, 3), class_centres(5, 3, 2)
  kinds = {}
  for row in ROWS:
    has_several = row.centres_per_class > 1
    kinds.setdefault((type(row.make(table[has_several])), has_several), row)
  return list(kinds.values())


each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_kind = pytest.mark.parametrize(
  "row", _first_of_each_kind(), ids=lambda row: row.name
)
