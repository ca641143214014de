"""The fragments of configs/mining make what they say, beside a run file."""

from __future__ import annotations

import pathlib

import gin
import pytest

import trainer.gin_registrations  # noqa: F401  Registers what configs name.
from trainer.config import run_config
from trainer.mining.miner import Miner

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
_SIZES = (
  "MinedTripletSampler.groups_per_batch = 8",
  "MinedTripletSampler.negatives_per_group = 6",
)


@pytest.mark.parametrize(
  ("name", "params"), [("groups", _SIZES), ("neighbouring_classes", ())]
)
def test_a_fragment_of_mining_makes_a_miner_and_a_sampler(name, params):
  files = [_CONFIGS / "runs" / "digits.gin", _CONFIGS / "mining" / f"{name}.gin"]
  loaded = run_config.load(
    [str(file) for file in files], ["MINING_STEPS = 100", *params], needed=("train",)
  )
  made = gin.get_configurable("OfflineMining")()
  made.check(steps_per_loop=50)
  assert isinstance(made.miner, Miner)
  assert callable(made.sampler_fn)
  assert loaded.values["train.mining.every_steps"] == "100"


def test_every_fragment_of_mining_is_tested():
  names = {path.stem for path in (_CONFIGS / "mining").glob("*.gin")}
  assert names == {"groups", "neighbouring_classes"}
