"""N replicas train like one: every loss, mined across replicas and on each alone.

Each loss is tested with six of the combinations, which contain every pair of options.
One loss is tested with all of them. Half of all combinations took eight minutes;
python -m tests.distribute.parity_table prints all. SGD clips gradients, and a last
example of padding makes the counts of the replicas unequal.
"""

from __future__ import annotations

import functools
import inspect
import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.losses.table import FIRST_OF_EACH_CLASS, ROWS
from tests.thorough import thorough_except
from trainer import losses
from trainer.data.pipeline import PADDING_LABEL, PADDING_RECORD, Batch
from trainer.losses import LearnedTemperature
from trainer.losses.objectives import global_negatives, local_negatives
from trainer.losses.tiled_loss import TiledPairLoss
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import parity
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

pytestmark = pytest.mark.parity

_NUM_CLASSES, _NUM_SAMPLES, _INPUT_SIZE = 8, 3, 10
_OPTIMIZERS = {
  "sgd": lambda: tf.keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
  "adam": lambda: tf.keras.optimizers.Adam(1e-3),
}
_THOROUGH = "InfoNCELoss-learned"
# The other losses are not compiled by XLA and have only their own statistics:
# compilation is per replica device.
_QUIET = {"mining_statistics": None}
_SHALLOW = {**_QUIET, "hidden_units": ()}
_OBJECTIVES = {"gathered": global_negatives, "alone": local_negatives}


def _learning(loss_class):
  return lambda **more: loss_class(temperature=LearnedTemperature(initial=0.5), **more)


_LEARNING = {
  f"{loss_class.__name__}-learned": _learning(loss_class)
  for loss_class in vars(losses).values()
  if inspect.isclass(loss_class)
  and "temperature" in inspect.signature(loss_class).parameters
}
_CHOICES = (("gathered", "alone"), ("plain", "streaming"), (1, 2, 4), ("sgd", "adam"))
ALL = list(itertools.product(*_CHOICES))
# The case per class that is not thorough, and the loss whose cases all are not.
_SHORT = ("gathered", "streaming", 2, "sgd")
_KEPT = "BatchHardTripletLoss-0.7"
_PAIRS = [
  ("gathered", "plain", 1, "sgd"),
  ("alone", "streaming", 1, "adam"),
  ("gathered", "streaming", 2, "sgd"),
  ("alone", "plain", 2, "adam"),
  ("gathered", "plain", 4, "adam"),
  ("alone", "streaming", 4, "sgd"),
]
LOSSES = {**{row.name: row.make.__wrapped__ for row in ROWS}, **_LEARNING}
_ONE_OF_EACH = {_THOROUGH, *(row.name for row in FIRST_OF_EACH_CLASS)}


@functools.cache
def _batches(num_steps=3):
  rng = np.random.default_rng(3)
  labels = np.repeat(np.arange(_NUM_CLASSES, dtype=np.int32), _NUM_SAMPLES)
  labels[-1] = PADDING_LABEL
  weights = (labels != PADDING_LABEL).astype(np.float32)
  centres = rng.normal(size=(_NUM_CLASSES, _INPUT_SIZE))
  batches = []
  for step in range(num_steps):
    inputs = centres[labels] + rng.normal(size=(len(labels), _INPUT_SIZE))
    # Every other step has the same images in a different order.
    numbers = rng.permutation(len(labels)) + step % 2 * len(labels)
    numbers = np.where(labels == PADDING_LABEL, PADDING_RECORD, numbers)
    rows = (labels, weights, numbers.astype(np.int32))
    batches.append(Batch(inputs.astype(np.float32), *rows))
  return batches


def _maker(
  make_loss,
  objective,
  optimizer,
  *,
  hidden_units=(16,),
  dropout_rate=0.0,
  num_micro_batches=1,
  compiled="nothing",
  **parts,
):
  def make_step():
    tf.keras.utils.set_random_seed(11)
    backbone = Perceptron(hidden_units=hidden_units, dropout_rate=dropout_rate)
    step = TrainStep(
      encoder=Encoder(backbone=backbone, embedding_size=6),
      loss=make_loss(),
      objective_fn=_OBJECTIVES[objective],
      optimizer=_OPTIMIZERS[optimizer](),
      options=StepOptions(num_micro_batches=num_micro_batches, compiled=compiled),
      **parts,
    )
    step.create_variables((_INPUT_SIZE,))
    return step

  return make_step


def _options(loss):
  return {} if loss == _THOROUGH else _SHALLOW


@functools.cache
def _expected(loss, num_parts, optimizer):
  """Returns results of one replica: the whole batch, or the mean over `num_parts`."""
  objective = "gathered" if num_parts == 1 else "alone"
  make_step = _maker(LOSSES[loss], objective, optimizer, **_options(loss))
  return parity.expected(make_step, _batches(), num_parts)


def test_table_has_every_public_loss_and_every_learned_temperature():
  public = {
    each
    for name, each in vars(losses).items()
    if name in losses.__all__
    and inspect.isclass(each)
    and issubclass(each, TiledPairLoss)
  }
  assert {type(make()) for make in LOSSES.values()} == public
  assert len(_LEARNING) >= 3


def test_every_pair_of_options_occurs_in_some_combination():
  for one, other in itertools.combinations(range(len(_CHOICES)), 2):
    met = {(case[one], case[other]) for case in _PAIRS}
    assert met == set(itertools.product(_CHOICES[one], _CHOICES[other]))


def _cases():
  """Returns (loss, objective, form, replicas, optimizer); one loss has all of them."""
  more = [(*case[:-1], "adam") for case in ALL if case[-1] == "sgd"]
  for loss in sorted(LOSSES):
    cases = {*_PAIRS, *more} if loss == _THOROUGH else _PAIRS
    kept = {_SHORT} if loss in _ONE_OF_EACH else set()
    kept |= {*_PAIRS} if loss == _KEPT else set()
    for case in sorted(cases):
      marks = () if case in kept else pytest.mark.thorough
      yield pytest.param(loss, *case, marks=marks)


def errors_of(mirrored, loss, objective, form, num_replicas, optimizer):
  """Returns the errors of one case, by quantity."""
  # The expected results have neither replicas nor tiles.
  wanted = _expected(loss, 1 if objective == "gathered" else num_replicas, optimizer)
  more = {} if form == "plain" else {"rows_per_tile": 4}
  make_loss = functools.partial(LOSSES[loss], **more)
  make_step = _maker(make_loss, objective, optimizer, **_options(loss))
  got = parity.trained(mirrored(num_replicas), make_step, _batches())
  return parity.errors(got, wanted)


@pytest.mark.parametrize(
  ("loss", "objective", "form", "num_replicas", "optimizer"), _cases()
)
def test_replicas_compute_the_results_of_one_replica(
  mirrored, loss, objective, form, num_replicas, optimizer
):
  found = errors_of(mirrored, loss, objective, form, num_replicas, optimizer)
  assert parity.is_equal(found), parity.table([(loss, found)])


def test_gathering_and_not_gathering_differ():
  # Otherwise the table would accept a gather without effect.
  one = _expected("BatchHardTripletLoss-0.7", 1, "sgd")
  other = _expected("BatchHardTripletLoss-0.7", 2, "sgd")
  found = parity.errors(other, one)
  assert min(found[name] for name in ("loss", "gradients", "weights")) > 1e-3


@pytest.mark.parametrize("quantity", parity.QUANTITIES)
def test_error_in_any_quantity_is_detected(quantity):
  one = _expected("BatchHardTripletLoss-0.7", 1, "sgd")
  value = getattr(one, quantity)
  wrong = (
    {name: 1.001 * each for name, each in value.items()}
    if isinstance(value, dict)
    else [1.001 * each for each in value]
  )
  found = parity.errors(one._replace(**{quantity: wrong}), one)
  assert [name for name in found if found[name] > parity.TOLERANCE] == [quantity]
  assert "FAILS" in parity.table([("wrong", found)])


def test_nan_is_not_equal():
  assert not parity.is_equal({"loss": float("nan")})


@pytest.mark.parametrize("num_replicas", thorough_except([2], [2, 4]))
def test_dropout_is_the_same_on_any_number_of_replicas(mirrored, num_replicas):
  make_step = _maker(
    LOSSES["NPairsLoss"], "gathered", "sgd", dropout_rate=0.5, **_QUIET
  )
  wanted = parity.expected(make_step, _batches(), 1)
  got = parity.trained(mirrored(num_replicas), make_step, _batches())
  assert parity.is_equal(parity.errors(got, wanted))
  without = parity.expected(
    _maker(LOSSES["NPairsLoss"], "gathered", "sgd", **_QUIET), _batches(), 1
  )
  assert parity.errors(without, wanted)["gradients"] > 1e-2


@pytest.mark.parametrize(
  ("num_micro_batches", "num_replicas"),
  thorough_except([(3, 1), (12, 2)], [(3, 1), (3, 2), (12, 1), (12, 2)]),
)
def test_micro_batches_with_dropout_equal_the_plain_step(
  mirrored, num_micro_batches, num_replicas
):
  make_loss, options = LOSSES["InfoNCELoss-learned"], {"dropout_rate": 0.3, **_QUIET}
  wanted = parity.expected(
    _maker(make_loss, "gathered", "sgd", **options), _batches(), 1
  )
  make_step = _maker(
    make_loss, "gathered", "sgd", num_micro_batches=num_micro_batches, **options
  )
  got = parity.trained(mirrored(num_replicas), make_step, _batches())
  found = parity.errors(got, wanted)
  assert parity.is_equal(found), parity.table([("micro-batches", found)])
