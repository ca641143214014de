"""The sampler that switches from one mining round to the next."""

from __future__ import annotations

import functools
import gc
import pathlib
import weakref

import gin
import numpy as np
import pytest

import trainer.gin_registrations  # noqa: F401  Registers parts of configs.
from tests.mining.deciding import (
  DATASET,
  Constant,
  groups_of,
  make_rounds,
  mined_round,
  of_step,
)
from trainer.config import run_config
from trainer.errors import UserError
from trainer.mining.mined_samplers import neighbouring_class_sampler
from trainer.mining.miner import Miner
from trainer.mining.offline_mining import OfflineMining, PiecewiseSampler


def test_one_call_may_draw_steps_of_several_rounds():
  sampler = PiecewiseSampler(Constant(0))
  sampler.use_from(4, Constant(1, (6, 2)))
  drawn = sampler.batches(np.array([9, 0, 3, 4]))
  assert drawn.shape == (4, 3, 4)
  assert drawn[:, 2, 1].tolist() == [1, 0, 0, 1]


def test_current_and_previous_samplers_are_kept():
  sampler, held = PiecewiseSampler(Constant(0)), []
  for number in (1, 2, 3):
    held.append(Constant(number))
    sampler.use_from(10 * number, held[-1])
  held = [weakref.ref(each) for each in held]
  gc.collect()
  assert [each() is None for each in held] == [True, False, False]
  assert sampler.batches(np.array([29, 30]))[:, 0, 0].tolist() == [2, 3]
  with pytest.raises(ValueError, match="are kept from step 20 on; got 19"):
    sampler.batches(np.array([30, 19]))


_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
_SIZES = (
  "MinedTripletSampler.groups_per_batch = 8",
  "MinedTripletSampler.negatives_per_group = 6",
)


@pytest.mark.parametrize(
  ("name", "params"), [("groups", _SIZES), ("neighbouring_classes", ())]
)
def test_mining_fragment_builds_a_miner_and_a_sampler(name, params):
  files = [_CONFIGS / "runs" / "digits.gin", _CONFIGS / "mining" / f"{name}.gin"]
  loaded = run_config.load(
    [str(file) for file in files], ["MINING_STEPS = 100", *params], needed=("train",)
  )
  made = gin.get_configurable("OfflineMining")()
  made.check(steps_per_loop=50)
  assert isinstance(made.miner, Miner)
  assert callable(made.sampler_fn)
  assert loaded.values["train.mining.every_steps"] == "100"


def test_every_mining_fragment_is_tested():
  names = {path.stem for path in (_CONFIGS / "mining").glob("*.gin")}
  assert names == {"groups", "neighbouring_classes"}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"every_steps": 0}, "every_steps=0 must be at least 1"),
    ({"max_age_steps": 0}, "max_age_steps=0 must be at least 1"),
    ({"max_wait_s": -1.0}, "max_wait_s=-1.0 must be at least 0"),
    ({"when_too_few": "go"}, "'go' must be one of keep, stop"),
  ],
)
def test_invalid_options_are_refused(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    make_rounds(tmp_path, **options)


def test_rounds_between_two_loop_ends_are_refused():
  with pytest.raises(UserError, match=r"every_steps=10 must be a multiple of .*=4"):
    OfflineMining(sampler_fn=of_step, every_steps=10).check(4)


def test_different_batch_size_is_refused(tmp_path):
  def larger(index, mining_round, *, classes):
    return Constant(1, (2, 7))

  rounds = make_rounds(tmp_path, miner=mined_round, sampler_fn=larger)
  options = OfflineMining(sampler_fn=larger, every_steps=10)
  for check in (
    lambda: rounds.decide(10),
    lambda: options.dry_run(DATASET, (3, 4), 1),
  ):
    with pytest.raises(UserError, match=r"of 2 x 7 = 14 records, .* of 3 x 4 = 12"):
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
    ({"sampler_fn": groups_of(61)}, 1, "=61 exceeds the 60 anchors"),
    (
      {
        "sampler_fn": groups_of(16),
        "miner": Miner(examples=object(), records_per_class=3),
      },
      1,
      "=16 exceeds the 15 anchors",
    ),
    (
      {
        "sampler_fn": functools.partial(
          neighbouring_class_sampler,
          sampler_fn=None,
          hard_fraction=0.5,
          neighbours_per_seed=4,
        ),
        "miner": Miner(num_class_neighbours=3),
      },
      1,
      "neighbours_per_seed=4 exceeds the 3 neighbours of each class in a round",
    ),
    (
      {"miner": Miner(num_class_neighbours=3)},
      1,
      "no examples for MinedTripletSampler; set",
    ),
  ],
)
def test_impossible_requirements_are_refused_before_mining(
  options, num_replicas, message
):
  options = OfflineMining(**{"sampler_fn": groups_of(3), "every_steps": 10, **options})
  with pytest.raises(UserError, match=message):
    options.dry_run(DATASET, (6, 4), num_replicas)


@pytest.mark.parametrize("miner", [None, Miner(examples=object())])
def test_valid_options_are_accepted(miner):
  options = OfflineMining(sampler_fn=groups_of(6), every_steps=10, miner=miner)
  options.dry_run(DATASET, (8, 3), 2)
  with pytest.raises(UserError, match=r"6 groups .* do not split over 4 replicas"):
    options.dry_run(DATASET, (8, 3), 4)
