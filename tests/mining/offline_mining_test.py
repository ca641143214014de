"""Options of offline mining: what does not fit is refused before a step is made."""

from __future__ import annotations

import functools

import pytest

from tests.mining.deciding import (
  DATASET,
  Constant,
  groups_of,
  make_rounds,
  mined_round,
  of_step,
)
from trainer.errors import UserError
from trainer.mining.mined_samplers import with_neighbouring_classes
from trainer.mining.miner import Miner
from trainer.mining.offline_mining import OfflineMining


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"every_steps": 0}, "every_steps=0 must be at least 1"),
    ({"max_age_steps": 0}, "max_age_steps=0 must be at least 1"),
    ({"max_wait_s": -1.0}, "max_wait_s=-1.0 is below 0"),
    ({"when_too_few": "go"}, "'go' is neither keep nor stop"),
  ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    make_rounds(tmp_path, **options)


def test_rounds_between_two_looks_of_the_host_are_refused():
  with pytest.raises(UserError, match=r"every_steps=10 must be a multiple of .*=4"):
    OfflineMining(sampler_fn=of_step, every_steps=10).check(4)


def test_batches_of_another_size_are_refused(tmp_path):
  def larger(index, mining_round, *, classes):
    return Constant(1, (2, 7))

  rounds = make_rounds(tmp_path, miner=mined_round, sampler_fn=larger)
  options = OfflineMining(sampler_fn=larger, every_steps=10)
  for check in (
    lambda: rounds.decide(10),
    lambda: options.dry_run(DATASET, (3, 4), 1),
  ):
    with pytest.raises(UserError, match=r"of 2 x 7 = 14 records, and .* of 3 x 4 = 12"):
      check()


def test_groups_that_do_not_divide_are_refused(tmp_path, mirrored):
  def three(index, mining_round, *, classes):
    return Constant(1, (3, 4))

  with mirrored(2).scope():
    rounds = make_rounds(tmp_path, miner=mined_round, sampler_fn=three)
    with pytest.raises(UserError, match=r"3 groups .* do not split over 2 replicas"):
      rounds.decide(10)


@pytest.mark.parametrize(
  ("options", "num_replicas", "message"),
  [
    ({"sampler_fn": groups_of(6)}, 4, "6 groups .* do not split over 4 replicas"),
    ({"sampler_fn": groups_of(61)}, 1, "=61 but a round has 60 anchors"),
    (
      {
        "sampler_fn": groups_of(16),
        "miner": Miner(examples=object(), records_per_class=3),
      },
      1,
      "=16 but a round has 15 anchors",
    ),
    (
      {
        "sampler_fn": functools.partial(
          with_neighbouring_classes,
          sampler_fn=None,
          hard_share=0.5,
          neighbours_per_seed=4,
        ),
        "miner": Miner(num_class_neighbours=3),
      },
      1,
      "neighbours_per_seed=4, and a round has 3 of each class; raise Miner",
    ),
    (
      {"miner": Miner(num_class_neighbours=3)},
      1,
      "no examples for MinedTripletSampler; set",
    ),
  ],
)
def test_what_rounds_can_never_have_is_refused_before_there_is_one(
  options, num_replicas, message
):
  options = OfflineMining(**{"sampler_fn": groups_of(3), "every_steps": 10, **options})
  with pytest.raises(UserError, match=message):
    options.dry_run(DATASET, (6, 4), num_replicas)


@pytest.mark.parametrize("miner", [None, Miner(examples=object())])
def test_what_fits_is_not_refused(miner):
  options = OfflineMining(sampler_fn=groups_of(6), every_steps=10, miner=miner)
  options.dry_run(DATASET, (8, 3), 2)
  with pytest.raises(UserError, match=r"6 groups .* do not split over 4 replicas"):
    options.dry_run(DATASET, (8, 3), 4)
