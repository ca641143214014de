"""Parity check: the same steps on N replicas and on one, compared.

The expected result is computed on one replica from the definition. If the batch is
mined across replicas, it uses the whole batch. If each replica mines alone, it is the
mean over the replicas' parts.

Shapes: G examples of a global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica, current_collectives
from trainer.losses.cross_batch_memory import Entries
from trainer.losses.metric_accumulators import summarize
from trainer.losses.objectives import mines_across_replicas
from trainer.training.step import TrainStep, Update

TOLERANCE = 1e-5
_NUM_DRAWS = 3
QUANTITIES = ("loss", "gradients", "weights", "statistics")


class Outcome(NamedTuple):
  """Result of some steps, by the quantities compared.

  Attributes:
    loss: of each step.
    gradients: of the first step, to each trainable variable.
    weights: each trainable variable after the last step.
    statistics: of the first step, by name.
    gradient_scales: the largest value of each gradient before the examples' gradients
      cancel each other; empty if not measured.
    centres: class centres and their moments after the last step, an array of each.
  """

  loss: list[np.ndarray]
  gradients: list[np.ndarray]
  weights: list[np.ndarray]
  statistics: dict[str, np.ndarray]
  gradient_scales: Sequence[float] = ()
  centres: Sequence[np.ndarray] = ()


def expected(
  make_step: Callable[[], TrainStep], batches: Sequence[Batch], num_replicas: int
) -> Outcome:
  """Computes the expected outcome of N replicas on one replica.

  Args:
    make_step: creates the step and its variables, with equal values each time.
    batches: a global batch for each step, [G, ...].
    num_replicas: N; relevant only if each replica mines alone.
  """
  step = make_step()
  num_parts = 1 if mines_across_replicas(step.objective_fn) else num_replicas

  def update(parts):
    done = [step.compute_update(part, OneReplica()) for part in parts]
    of_parts = zip(*(each.update.gradients for each in done))
    gradients = [tf.add_n(each) / num_parts for each in of_parts]
    entries = _one_after_the_other([each.update.entries for each in done])
    active = tf.nest.map_structure(
      lambda *v: tf.add_n(v), *(each.update.active for each in done)
    )
    # Class centres need all examples, which is one part.
    step.apply_update(Update(gradients, entries, active, done[0].update.rows))
    sums = tf.nest.map_structure(
      lambda *v: tf.add_n(v), *(each.statistics for each in done)
    )
    return sums["train/loss"].total / num_parts, gradients, sums

  results = [update(_split(batch, num_parts)) for batch in batches]
  return _outcome(step, tf.nest.map_structure(lambda value: value.numpy(), results))


def trained(
  strategy: tf.distribute.Strategy,
  make_step: Callable[[], TrainStep],
  batches: Sequence[Batch],
) -> Outcome:
  """Computes the outcome of the replicas of a strategy.

  Args:
    strategy: the replicas.
    make_step: creates the step and its variables, with equal values each time.
    batches: a global batch for each step, [G, ...].
  """
  with strategy.scope():
    step = make_step()

  def on_replica(batch):
    proposal = step.compute_update(batch, current_collectives())
    step.apply_update(proposal.update)
    return proposal.update.gradients, proposal.statistics

  @tf.function(autograph=False)
  def update(batch):
    gradients, statistics = strategy.run(on_replica, (batch,))
    sums = tf.nest.map_structure(
      lambda value: strategy.reduce("SUM", value, axis=None), statistics
    )
    first = [strategy.experimental_local_results(each)[0] for each in gradients]
    return sums["train/loss"].total, first, sums

  results = [update(_distributed(strategy, batch)) for batch in batches]
  return _outcome(step, tf.nest.map_structure(lambda value: value.numpy(), results))


def gradient_scales(make_step: Callable[[], TrainStep], batch: Batch) -> list[float]:
  """Measures the size of each gradient before the examples cancel each other.

  A float32 sum is rounded in proportion to its terms. The sign of each example's
  gradient is drawn at random, which keeps the size of the terms. In the mean over the
  draws, the square of the result is the sum of their squares.

  Args:
    make_step: creates the step and its variables, with equal values each time.
    batch: a global batch, [G, ...].

  Returns:
    For each trainable variable, the largest number of a few draws.
  """
  step = make_step()
  encode = step.encoder.call
  scales = [0.0] * len(step.trainable_variables)
  for seed in range(_NUM_DRAWS):
    step.encoder.call = _with_random_signs(encode, seed)
    gradients = step.compute_update(batch, OneReplica()).update.gradients
    sizes = [float(tf.reduce_max(tf.abs(each))) for each in gradients]
    scales = [max(pair) for pair in zip(scales, sizes)]
  return scales


def _with_random_signs(encode: Callable, seed: int) -> Callable:
  """Wraps the encoder to multiply each example's gradient by 1 or −1."""

  def times_signs(gradient):
    shape = [tf.shape(gradient)[0], 1]
    noise = tf.random.stateless_uniform(shape, [seed, 0], -1.0, 1.0)
    return gradient * tf.cast(tf.sign(noise), gradient.dtype)

  @tf.custom_gradient
  def identity(embeddings):
    return embeddings, times_signs

  return lambda inputs, **options: identity(encode(inputs, **options))


def errors(got: Outcome, wanted: Outcome) -> dict[str, float]:
  """Returns the largest error of each quantity, relative to the tensor's largest value.

  The error of a gradient is relative to its scale, if `wanted` has one. The error of
  the weights is relative to the largest of all weights. Adam divides a gradient that is
  a rounding error by its own size, so a bias that started at 0 is no larger than its
  steps.

  Args:
    got: outcome of the replicas.
    wanted: outcome of one replica.

  Returns:
    By quantity, also "centres" if there are any; infinite if the structure differs from
    the expected one.
  """
  if got.statistics.keys() != wanted.statistics.keys():
    return dict.fromkeys(QUANTITIES, float("inf"))
  names = sorted(wanted.statistics)
  statistics = ([each.statistics[name] for name in names] for each in (got, wanted))
  largest = max(np.abs(weight).max() for weight in wanted.weights)
  found = {
    "loss": _error(got.loss, wanted.loss),
    "gradients": _error(got.gradients, wanted.gradients, wanted.gradient_scales),
    "weights": _error(got.weights, wanted.weights, [largest] * len(wanted.weights)),
    "statistics": _error(*statistics),
  }
  if wanted.centres:
    found["centres"] = _error(got.centres, wanted.centres)
  return found


def table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
  """Formats the errors of all rows as text, each with its verdict.

  Args:
    rows: name and errors by quantity of each.
  """
  width = max(len(name) for name, _ in rows) + 2
  quantities = dict.fromkeys(quantity for _, found in rows for quantity in found)
  lines = [" " * width + "".join(f"{name:>12}" for name in quantities)]
  for name, found in rows:
    cells = "".join(f"{error:12.1e}" for error in found.values())
    lines.append(f"{name:<{width}}{cells}  {'ok' if is_equal(found) else 'FAILS'}")
  return "\n".join(lines)


def is_equal(found: Mapping[str, float]) -> bool:
  """Returns whether all errors are within the tolerance; NaN is not."""
  return all(error <= TOLERANCE for error in found.values())


def _outcome(step: TrainStep, results: list) -> Outcome:
  _, gradients, statistics = results[0]
  return Outcome(
    [loss for loss, _, _ in results],
    gradients,
    [variable.numpy() for variable in step.trainable_variables],
    {name: np.array(value) for name, value in summarize(statistics).items()},
    centres=_centres(step),
  )


def _centres(step: TrainStep) -> list[np.ndarray]:
  """Returns class centres and moments of each table of the loss, [C, k·D] each."""
  tables = [
    np.concatenate([rows for _, rows in table.local_rows()])
    for table in step.loss.tables
  ]
  return [table[:, number] for table in tables for number in range(table.shape[1])]


def _error(got, wanted, scales=()) -> float:
  # If all expected values are 0, only 0 is correct.
  least = scales or [np.float32(1e-30)] * len(wanted)
  scales = [max(np.abs(each).max(), size) for each, size in zip(wanted, least)]
  found = [
    np.abs(one - other).max() / size for one, other, size in zip(got, wanted, scales)
  ]
  return float(np.max(found))  # NaN stays NaN.


def _one_after_the_other(
  entries: Sequence[Optional[Entries]],
) -> Optional[Entries]:
  """Joins the bank entries of the parts of a batch; None without a bank."""
  of_parts = [each for each in entries if each is not None]
  if not of_parts:
    return None
  return Entries(*(tf.concat(values, 0) for values in zip(*of_parts)))


def _split(batch: Batch, num_parts: int) -> list[Batch]:
  split = [tf.split(tf.convert_to_tensor(each), num_parts) for each in batch]
  return [Batch(*part) for part in zip(*split)]


def _distributed(strategy: tf.distribute.Strategy, batch: Batch):
  parts = _split(batch, strategy.num_replicas_in_sync)
  return strategy.experimental_distribute_values_from_function(
    lambda context: parts[context.replica_id_in_sync_group]
  )
