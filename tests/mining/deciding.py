"""Decisions on mining rounds with constant samplers, for tests."""

from __future__ import annotations

import functools
import types

import numpy as np

from tests.mining.corpora import example_arrays, write_round
from trainer.mining.mined_samplers import MinedTripletSampler
from trainer.mining.miner import RoundContent, corpus_fingerprint
from trainer.mining.offline_mining import OfflineMining
from trainer.mining.rounds import Rounds


class Constant:
  """A sampler that draws one number, which identifies it."""

  def __init__(self, number, shape=(3, 4)):
    self._number = number
    self.shape = shape

  def batches(self, steps):
    return np.full((len(steps), *self.shape), self._number)


# Nine classes of twelve records; five are training classes.
INDEX = types.SimpleNamespace(
  fingerprint=lambda: {"the number of records": 60},
  num_records=60,
  num_classes=9,
  member_table=types.SimpleNamespace(starts=12 * np.arange(10)),
)
DATASET = types.SimpleNamespace(
  index=INDEX,
  train_classes=np.arange(5),
  decoder=types.SimpleNamespace(features=("x",)),
)


def of_step(index, mining_round, *, classes):
  return Constant(mining_round.step, (2, 6))


def make_rounds(
  folder, *, miner=None, oldest_step=0, continues_unwritten=False, **options
):
  options = {"sampler_fn": of_step, "every_steps": 10, **options}
  return Rounds(
    OfflineMining(**options),
    DATASET,
    Constant(-7),
    str(folder),
    mine_fn=miner,
    continues_unwritten=continues_unwritten,
    oldest_step_fn=lambda: oldest_step,
  )


def groups_of(num_groups):
  return functools.partial(
    MinedTripletSampler, groups_per_batch=num_groups, negatives_per_group=2, seed=1
  )


def mined_round(step):
  return RoundContent(example_arrays(seed=step), {"counts": {"anchors": 20}})


def write_rounds(folder, *steps):
  for step in steps:
    write_round(folder, step, corpus_fingerprint(DATASET), **example_arrays())


def drawn(rounds, *steps):
  return rounds.sampler.batches(np.array(steps))[:, 0, 0].tolist()


def harm(folder, step):
  path = folder / "mining" / f"round-{step:08d}" / "anchors.npy"
  path.write_bytes(path.read_bytes()[:-1])
