"""What the losses are measured against: formulas as plain as they can be, and peers."""

from __future__ import annotations

import tensorflow as tf


@tf.custom_gradient
def distance_matrix(embeddings):
  """[B, B] Euclidean distances and their gradient, in few operations of TensorFlow."""
  norms = tf.reduce_sum(tf.square(embeddings), 1, keepdims=True)
  ones = tf.ones_like(norms)
  left = tf.concat([-2.0 * embeddings, norms, ones], 1)
  right = tf.concat([embeddings, ones, norms], 1)
  squared = tf.matmul(left, right, transpose_b=True)
  is_zero = squared <= 16 * 2.0**-23 * norms
  inverse = tf.math.rsqrt(tf.where(is_zero, float("inf"), squared))

  def gradient(upstream):
    slope = upstream * inverse
    with_ones = tf.concat([embeddings, ones], 1)
    by_rows = tf.matmul(slope, with_ones)
    by_columns = tf.matmul(slope, with_ones, transpose_a=True)
    both = by_rows + by_columns
    return both[:, -1:] * embeddings - both[:, :-1]

  return squared * inverse, gradient


def cube(labels, embeddings, margin):
  """batch_all from its formula, with a [B, B, B] tensor of triplets."""
  distances = distance_matrix(embeddings)
  same = tf.equal(labels[:, None], labels[None, :])
  positive = tf.logical_and(same, ~tf.eye(len(labels), dtype=tf.bool))
  valid = tf.logical_and(positive[:, :, None], ~same[:, None, :])
  hinge = tf.nn.relu(distances[:, :, None] - distances[:, None, :] + margin)
  hinge = tf.where(valid, hinge, 0.0)
  return tf.reduce_sum(hinge) / tf.reduce_sum(tf.sign(hinge))


def tile_products(vectors, rows_per_tile):
  """The three products of each tile, one forward and two back, and nothing else."""

  @tf.function
  def run():
    total = tf.zeros([])
    for first in tf.range(0, vectors.shape[0], rows_per_tile):
      rows = vectors[first : first + rows_per_tile]
      product = tf.matmul(rows, vectors, transpose_b=True)
      total += tf.reduce_sum(tf.matmul(product, vectors))
      total += tf.reduce_sum(tf.matmul(product, rows, transpose_a=True))
    return total

  return run


def addons_semi_hard(labels, margin):
  """TensorFlow Addons' loss of embeddings; None where it is not installed."""
  try:
    from tensorflow_addons.losses import triplet_semihard_loss
  except ImportError:
    return None
  return lambda embeddings: triplet_semihard_loss(labels, embeddings, margin=margin)


def pml_batch_all(labels, vectors, margin):
  """A call of PyTorch Metric Learning with its gradient; None where it is missing."""
  try:
    import torch
    from pytorch_metric_learning import losses
  except ImportError:
    return None
  loss_fn = losses.TripletMarginLoss(margin=margin)
  labels = torch.tensor(labels)

  def run():
    embeddings = torch.tensor(vectors, requires_grad=True)
    loss = loss_fn(embeddings, labels)
    loss.backward()
    return loss.detach()

  return run


def pml_arc_face(labels, vectors, num_classes, scale):
  """A step of PyTorch Metric Learning with SGD; None where it is not installed."""
  try:
    import torch
    from pytorch_metric_learning import losses
  except ImportError:
    return None
  loss_fn = losses.ArcFaceLoss(num_classes, vectors.shape[1], margin=28.6, scale=scale)
  optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1, momentum=0.9)
  labels = torch.tensor(labels)

  def run():
    embeddings = torch.tensor(vectors, requires_grad=True)
    optimizer.zero_grad()
    loss = loss_fn(embeddings, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return run
